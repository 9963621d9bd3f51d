# Swin with half the width of Swin-T, from random weights to blood cells, for
# two CPU cores.
steps = {
    'dense-upstream': '../swin_moe/swin-xtiny-patch4-window4_1xb64-7e_tiny-imagenet-100-64x64.py',
    'dense-downstream': '../swin_moe/retinanet_swin-xt-p4-w4_fpn_1xb4-12e_bccd-320x240.py',
    'rmoe-d-downstream': '../swin_moe/retinanet_swin-xt-moe-e8k1-p4-w4_fpn_1xb4-12e_bccd-320x240.py',
}
pipelines = {
    'non-moe': ['dense-upstream', 'dense-downstream'],
    'rmoe-d': ['dense-upstream', 'rmoe-d-downstream'],
}
