# RMoE-D (2204.09636) for detection: a small Swin, from random weights to BCCD,
# and the same with a single expert. Its router has nothing to choose, but Adam
# updates both core and residual, so what it gains does not come from experts.
# The dense checkpoint of rmoe-swin.py can be given with --dense.
_base_ = '../pipelines/swin-xtiny_bccd-320x240.py'
once = ['dense-upstream']
bf16 = {'optim_wrapper.type': 'rmoe.BFloat16OptimWrapper'}
pipelines = {'rmoe-d-e1': ['dense-upstream', 'rmoe-d-e1-downstream']}
steps = {
    'rmoe-d-e1-downstream': '../swin_moe/retinanet_swin-xt-moe-e8k1-p4-w4_fpn_1xb4-12e_bccd-320x240.py',
}
options = {
    'dense-upstream': bf16,
    'dense-downstream': bf16,
    'rmoe-d-downstream': bf16,
    'rmoe-d-e1-downstream': {**bf16, 'model.backbone.moe.num_experts': 1},
}
