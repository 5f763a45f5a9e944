#!/usr/bin/env bash
# The paper's experiments as commands: bash tools/experiments.sh lists, then e.g. 1 3 fig4
#
# The names are those of tables and figures. Data sets lie in the folders below, with the authors'
# lists beside their files; `lists` turns these into clips csv files. Every command resumes a run
# that was stopped and only evaluates one that is done, so that tables share runs. RUN is what starts
# a script; RUN=echo prints the commands of the runs only.
set -euo pipefail
cd "$(dirname "$0")/.."

RUN=${RUN:-torchrun --nproc_per_node=8}
VGGSOUND_DIR=${VGGSOUND:-vggsound} AUDIOSET_DIR=${AUDIOSET:-audioset}
EPIC_DIR=${EPIC:-epic} AVE_DIR=${AVE:-ave}
VGGSOUND="--preset vggsound --data $VGGSOUND_DIR --clips lists/vggsound.csv"
AUDIOSET="--preset audioset --data $AUDIOSET_DIR --clips lists/audioset.csv"
AS500K="--preset audioset --data $AUDIOSET_DIR --clips lists/as500k.csv --val lists/as_eval.csv"
EPIC="--preset epic --data $EPIC_DIR --clips lists/epic_train.csv --val lists/epic_val.csv"
AVE="--preset ave --data $AVE_DIR --clips lists/ave_train.csv --val lists/ave_test.csv"
VIT_B=${VIT_B:-vit_base_patch16_224.augreg_in21k.safetensors}
VIT_L=${VIT_L:-vit_large_patch16_224.augreg_in21k.safetensors}

lists() {  # clips csv files; checkpoints of the ViTs in lists/, which tables 6 and 9 start from
    mkdir -p lists
    list() { make lists/$4.csv "$2" list_clips.py $1 "$2" "$3" --out lists/$4.csv; }
    list vggsound "$VGGSOUND_DIR/vggsound.csv" "$VGGSOUND_DIR" vggsound
    list audioset "$AUDIOSET_DIR/unbalanced_train_segments.csv" "$AUDIOSET_DIR" audioset
    list audioset "$AUDIOSET_DIR/as500k_segments.csv" "$AUDIOSET_DIR" as500k
    list audioset "$AUDIOSET_DIR/eval_segments.csv" "$AUDIOSET_DIR" as_eval
    for part in train validation; do
        list epic "$EPIC_DIR/EPIC_100_$part.csv" "$EPIC_DIR" epic_${part/idation/}
    done
    for part in train test; do list ave "$AVE_DIR/${part}Set.txt" "$AVE_DIR" ave_$part; done
    for v in "$VIT_B" "$VIT_L"; do make $(vit $v) $v convert_weights.py $v $(vit $v); done
}

make() {  # RESULT SOURCE TOOL...: unless the result is there
    [ -e "$2" ] || { echo "skipped: there is no $2"; return; }
    [ -e "$1" ] || python tools/"${@:3}"
}

vit() { echo "lists/$(basename "$1" .safetensors).pt"; }
init() {  # NAMES: runs, or checkpoints
    [ $# = 0 ] || echo --init
    for n in "$@"; do case $n in *.pt) echo "$n" ;; *) echo runs/"$n"/last.pt ;; esac; done
}

# NAME FLAGS: a run on VGGSound or AudioSet
pretrain() { $RUN train_pretrain.py $VGGSOUND --out runs/"$1" "${@:2}"; }
audioset() { $RUN train_pretrain.py $AUDIOSET --out runs/"$1" "${@:2}"; }

# NAME INIT FLAGS: on VGGSound, AS500K, Epic Kitchens; INIT is a run, several with spaces, or none
finetune() { $RUN train_finetune.py $VGGSOUND --out runs/f-"$1" $(init $2) "${@:3}"; }
as500k() { $RUN train_finetune.py $AS500K --out runs/as-"$1" $(init $2) "${@:3}"; }
epic() { $RUN train_finetune.py $EPIC --out runs/epic"$1" $(init $2) "${@:3}"; }

each_modality() {  # NAME INIT FLAGS: finetunes on audio, on video, and on both
    finetune "$1" "$2" "${@:3}"
    for m in audio video; do finetune "$1-$m" "$2" --modalities $m "${@:3}"; done
}
encoders() { for e in early shared separate mid; do pretrain b-$e --size base --encoder $e; done; }
separate_decoders() {
    for e in early shared; do
        pretrain b-$e-separate --size base --encoder $e --decoder separate
    done
}

table_1() {  # encoders and decoders
    encoders
    for e in early shared separate mid; do each_modality b-$e b-$e --size base; done
    for d in early separate; do pretrain b-mid-$d --size base --encoder mid --decoder $d; done
    separate_decoders
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

table_4() {  # transfer between data sets
    audioset audioset-80 --epochs 80
    pretrain l-mid-800 --encoder mid --epochs 800
    for n in audioset-80 l-mid-800; do finetune $n $n; as500k $n $n; epic -$n $n; done
}

table_5() {  # epochs
    for n in 200 400 800 1200; do
        pretrain l-mid-$n --encoder mid --epochs $n
        finetune l-mid-$n l-mid-$n
        epic -l-mid-$n l-mid-$n
    done
}

table_6() {  # backbones; supervised ones start from an ImageNet-21k ViT
    pretrain b-mid-800 --size base --encoder mid --epochs 800
    pretrain l-mid-800 --encoder mid --epochs 800
    finetune b-mid-800 b-mid-800 --size base
    finetune l-mid-800 l-mid-800
    finetune b-supervised "$(vit "$VIT_B")" --size base
    finetune l-supervised "$(vit "$VIT_L")"
}

table_7() {  # VGGSound, AudioSet, Epic Kitchens
    pretrain l-mid-800 --encoder mid --epochs 800
    each_modality l-mid-800 l-mid-800
    audioset audioset-120 --epochs 120
    for m in audio video "video audio"; do as500k "${m/ /-}" audioset-120 --modalities $m; done
    pretrain l-mid-1200 --encoder mid --epochs 1200
    epic "" l-mid-1200
}

table_8() {  # event localization
    pretrain b-mid --size base --encoder mid
    $RUN train_finetune.py $AVE --out runs/ave $(init b-mid)
}

table_9() {  # no pretraining, a supervised ViT, ours
    finetune scratch ""
    finetune l-supervised "$(vit "$VIT_L")"
    pretrain l-mid-800 --encoder mid --epochs 800
    finetune l-mid-800 l-mid-800
    audioset audioset-120 --epochs 120
    as500k scratch ""
    as500k supervised "$(vit "$VIT_L")"
    as500k video-audio audioset-120
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

mask_ratios() {  # MODALITY RATIOS: of one modality alone
    for r in "${@:2}"; do
        pretrain b-$1-$r --size base --modalities $1 --mask-$1 $r
        finetune b-$1-$r b-$1-$r --size base --modalities $1
    done
}
table_12() { mask_ratios audio 0.3 0.5 0.7 0.8; }
table_13() { mask_ratios video 0.7 0.9 0.95; }

table_14() {  # MBT against the pretraining encoder as it is
    encoders
    separate_decoders
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
        as500k $e audioset-$e
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

table_fig4() {  # learning curves: runs/fig4-*/curves.png
    for o in joint inpaint_both; do for lr in 5e-5 1.5e-4 5e-4; do
        pretrain fig4-$o-$lr --size base --encoder early --objective $o --lr $lr
    done; done
}

table_fig5() {  # reconstructions: runs/fig5/pictures
    python train_pretrain.py --eval runs/b-mid/last.pt --data "${CLIP:-clip.mp4}" --out runs/fig5
}

for name in "$@"; do
    [ "$name" != lists ] || { lists; continue; }
    declare -F "table_$name" > /dev/null || { echo "no table or figure $name" >&2; exit 1; }
    "table_$name"
done
