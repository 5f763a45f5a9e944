#!/usr/bin/env bash
# The paper's experiments as commands: bash assets/experiments.sh 1 3 fig4
#
# The names are those of tables and figures. Data sets lie in the folders below; every command
# continues a run that was stopped and only evaluates one that is done, so that tables share runs.
# RUN says how a script is started, RUN=echo prints the commands only.
set -euo pipefail
cd "$(dirname "$0")/.."

RUN=${RUN:-torchrun --nproc_per_node=8}
VGGSOUND="--preset vggsound --data ${VGGSOUND:-vggsound} --annotations ${VGGSOUND_CSV:-vggsound.csv}"
AUDIOSET="--preset audioset --data ${AUDIOSET:-audioset}"
EPIC="--preset epic --data ${EPIC:-epic} --annotations EPIC_100_train.csv --val-annotations EPIC_100_validation.csv"
AVE="--preset ave --data ${AVE:-ave} --annotations trainSet.txt --val-annotations testSet.txt"
AS500K="$AUDIOSET --annotations ${AS500K_CSV:-as500k_segments.csv} --val-annotations eval_segments.csv"
VIT_B=${VIT_B:-vit_base_patch16_224.augreg_in21k.safetensors}
VIT_L=${VIT_L:-vit_large_patch16_224.augreg_in21k.safetensors}

pretrain() {  # NAME FLAGS: on VGGSound
    $RUN train_pretrain.py $VGGSOUND --out runs/"$1" "${@:2}"
}

finetune() {  # NAME INIT FLAGS: on VGGSound; INIT is a run, several with spaces between, or none
    $RUN train_finetune.py $VGGSOUND --out runs/f-"$1" $(init $2) "${@:3}"
}

init() {
    [ $# = 0 ] || echo --init
    for name in "$@"; do
        case $name in *.safetensors) echo "$name" ;; *) echo runs/"$name"/last.pt ;; esac
    done
}

each_modality() {  # NAME INIT FLAGS: finetunes on audio, on video, and on both
    finetune "$1" "$2" "${@:3}"
    for m in audio video; do finetune "$1-$m" "$2" --modalities $m "${@:3}"; done
}

encoders() { for e in early shared separate mid; do pretrain b-$e --size base --encoder $e; done; }

table_1() {  # encoders and decoders
    encoders
    for e in early shared separate mid; do each_modality b-$e b-$e --size base; done
    for d in early separate; do pretrain b-mid-$d --size base --encoder mid --decoder $d; done
    for e in early shared; do pretrain b-$e-separate --size base --encoder $e --decoder separate; done
    for n in b-mid-early b-mid-separate b-early-separate b-shared-separate; do
        each_modality $n $n --size base
    done
}

table_2() {  # objectives
    for o in joint video_from_audio audio_from_video inpaint_both joint_inpaint; do
        pretrain b-early-$o --size base --encoder early --objective $o
        each_modality b-early-$o b-early-$o --size base
    done
}

single_models() {  # AudioMAE and VideoMAE
    for m in audio video; do
        pretrain b-$m --size base --encoder separate --modalities $m --epochs 800
    done
}

table_3() {  # one modality or two
    single_models
    pretrain b-mid-800 --size base --encoder mid --epochs 800
    for n in b-audio b-video b-mid-800; do each_modality $n $n --size base; done
}

audioset() { $RUN train_pretrain.py $AUDIOSET --out runs/"$1" "${@:2}"; }

table_4() {  # transfer between data sets
    audioset audioset-80 --epochs 80
    pretrain l-mid-800 --encoder mid --epochs 800
    for n in audioset-80 l-mid-800; do
        finetune $n $n
        $RUN train_finetune.py $AS500K --out runs/as-$n --init runs/$n/last.pt
        $RUN train_finetune.py $EPIC --out runs/epic-$n --init runs/$n/last.pt
    done
}

table_5() {  # epochs
    for n in 200 400 800 1200; do
        pretrain l-mid-$n --encoder mid --epochs $n
        finetune l-mid-$n l-mid-$n
        $RUN train_finetune.py $EPIC --out runs/epic-l-mid-$n --init runs/l-mid-$n/last.pt
    done
}

table_6() {  # backbones; supervised ones start from an ImageNet-21k ViT
    pretrain b-mid-800 --size base --encoder mid --epochs 800
    pretrain l-mid-800 --encoder mid --epochs 800
    finetune b-mid-800 b-mid-800 --size base
    finetune l-mid-800 l-mid-800
    finetune b-supervised "$VIT_B" --size base
    finetune l-supervised "$VIT_L"
}

table_7() {  # VGGSound, AudioSet, Epic Kitchens
    pretrain l-mid-800 --encoder mid --epochs 800
    each_modality l-mid-800 l-mid-800
    audioset audioset-120 --epochs 120
    for m in audio video "video audio"; do
        $RUN train_finetune.py $AS500K --out runs/as-"${m/ /-}" --modalities $m --init runs/audioset-120/last.pt
    done
    pretrain l-mid-1200 --encoder mid --epochs 1200
    $RUN train_finetune.py $EPIC --out runs/epic --init runs/l-mid-1200/last.pt
}

table_8() {  # event localisation
    pretrain b-mid --size base --encoder mid
    $RUN train_finetune.py $AVE --out runs/ave --init runs/b-mid/last.pt
}

table_9() {  # no pretraining, a supervised ViT, ours
    finetune scratch ""
    finetune l-supervised "$VIT_L"
    pretrain l-mid-800 --encoder mid --epochs 800
    finetune l-mid-800 l-mid-800
    audioset audioset-120 --epochs 120
    $RUN train_finetune.py $AS500K --out runs/as-scratch
    $RUN train_finetune.py $AS500K --out runs/as-supervised --init "$VIT_L"
    $RUN train_finetune.py $AS500K --out runs/as-video-audio --init runs/audioset-120/last.pt
}

table_10() {  # two separate autoencoders
    single_models
    finetune b-two "b-video b-audio" --size base
}

table_11() {  # mask ratios of both
    for a in 0.3 0.5 0.7 0.8; do for v in 0.7 0.9 0.95; do
        pretrain b-mask-$a-$v --size base --mask-audio $a --mask-video $v
        finetune b-mask-$a-$v b-mask-$a-$v --size base
    done; done
}

table_12() {  # of audio alone
    for a in 0.3 0.5 0.7 0.8; do
        pretrain b-audio-$a --size base --modalities audio --mask-audio $a
        finetune b-audio-$a b-audio-$a --size base --modalities audio
    done
}

table_13() {  # of video alone
    for v in 0.7 0.9 0.95; do
        pretrain b-video-$v --size base --modalities video --mask-video $v
        finetune b-video-$v b-video-$v --size base --modalities video
    done
}

table_14() {  # MBT against the pretraining encoder as it is
    encoders
    for e in early shared; do pretrain b-$e-separate --size base --encoder $e --decoder separate; done
    for n in b-early b-early-separate b-separate b-shared-separate; do
        finetune $n $n --size base
        finetune $n-encoder $n --size base --model encoder
    done
}

table_15() {  # S
    for s in 1 2 4 8; do
        pretrain b-s-$s --size base --encoder mid --joint-layers $s
        finetune b-s-$s b-s-$s --size base
    done
}

table_16() {  # mid against separate on AudioSet
    for e in mid separate; do
        audioset audioset-$e --encoder $e --epochs 120
        $RUN train_finetune.py $AS500K --out runs/as-$e --init runs/audioset-$e/last.pt
    done
}

table_17() {  # half the data for as many steps
    pretrain b-half --size base --encoder mid --fraction 0.5 --epochs 800
    pretrain b-mid --size base --encoder mid
    for n in b-half b-mid; do each_modality $n $n --size base; done
}

table_18() {  # linear probe, audio
    encoders
    for e in early shared separate mid; do
        finetune b-$e-probe b-$e --size base --model probe --modalities audio
    done
}

table_19() { python tests/benchmark.py; }  # cost

table_20() { python train_pretrain.py $VGGSOUND --dry-run; }  # recipes: the settings that a run has

table_21() { python train_pretrain.py $VGGSOUND --size "${SIZE:-base}" --dry-run; }

table_22() { python train_finetune.py $VGGSOUND --dry-run; }

table_23() { python train_finetune.py $EPIC --dry-run; }

table_24() { python train_finetune.py $AS500K --dry-run; }

table_fig4() {  # learning curves: runs/fig4-*/curves.svg
    for o in joint inpaint_both; do for lr in 5e-5 1.5e-4 5e-4; do
        pretrain fig4-$o-$lr --size base --encoder early --objective $o --lr $lr
    done; done
}

table_fig5() {  # reconstructions: runs/fig5/pictures
    python train_pretrain.py --eval runs/b-mid/last.pt --data "${CLIP:-clip.mp4}" --out runs/fig5
}

for name in "$@"; do
    declare -F "table_$name" > /dev/null || { echo "there is no table or figure $name" >&2; exit 1; }
    "table_$name"
done
