"""Imported once by the server that forks the scripts of the tests (launch.py)."""

import pytest  # noqa: F401
import torch._dynamo  # noqa: F401  every optimizer imports it

import data
import train_finetune  # noqa: F401
import train_pretrain

# Most runs need these built-in clips; each fork has them.
window = train_pretrain.make_window(train_pretrain.parse_args([]))
for seed, count in (0, 40), (1_000_000, 40), (2_000_000, 64):
    for i in range(count):
        data.generated(seed, i, window, data.MODALITIES)
