# RMoE-D (2204.09636) on detection: a small Swin, from nothing to BCCD, and
# 'rmoe-d' with a single expert. It has nothing to choose, but Adam moves core
# and residual both, as in 'rmoe-d', so what it gains is not the experts'.
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
