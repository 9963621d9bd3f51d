_base_ = [
    './swin-large-patch4-window7-moe-e16k1-in22k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    '../_base_/parallel/sharded_ep8.py'
]
