# Swin-T on ImageNet-1k, then with Mask R-CNN on COCO.
_base_ = './swin-tiny_ade20k-512x512.py'
steps = {
    'dense-downstream': '../swin_moe/mask-rcnn_swin-t-p4-w7_fpn_8xb2-1x_coco.py',
    'moe-downstream': '../swin_moe/mask-rcnn_swin-t-moe-e8k1-scratch-p4-w7_fpn_8xb2-1x_coco.py',
    'rmoe-d-downstream': '../swin_moe/mask-rcnn_swin-t-moe-e8k1-p4-w7_fpn_8xb2-1x_coco.py',
    'rmoe-i-downstream': '../swin_moe/mask-rcnn_swin-t-moe-e8k1-p4-w7_fpn_8xb2-1x-rmoe-i_coco.py',
}
