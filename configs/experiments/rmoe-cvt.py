# RMoE (2204.09636) on a small CvT: the four pipelines, from nothing to CamVid.
# Upstream runs take most of the time, so all seeds share them. And one more:
# 'rmoe-d' with a single expert. It has nothing to choose, but Adam moves core
# and residual both, as in 'rmoe-d', so what it gains is not the experts'.
_base_ = '../pipelines/cvt-xtiny_camvid-256x256.py'
once = ['dense-upstream', 'moe-upstream', 'rmoe-i-upstream']
bf16 = {'optim_wrapper.type': 'rmoe.BFloat16OptimWrapper'}
# Half of the configs' iterations: a new head that learns five times as fast
# makes up for it.
short = {
    **bf16, 'optim_wrapper.paramwise_cfg.roles.head': dict(lr_mult=5.0),
    'param_scheduler.1.end': 500,
    'train_cfg.max_iters': 500,
    'train_cfg.val_interval': 500
}
pipelines = {'rmoe-d-e1': ['dense-upstream', 'rmoe-d-e1-downstream']}
steps = {
    'rmoe-d-e1-downstream': '../cvt_moe/cvt-xtiny-moe-e8k1_upernet_1xb4-1k_camvid-256x256.py',
}
options = {
    'dense-upstream': bf16,
    'moe-upstream': bf16,
    'rmoe-i-upstream': bf16,
    'dense-downstream': short,
    'moe-downstream': short,
    'rmoe-d-downstream': short,
    'rmoe-i-downstream': short,
    'rmoe-d-e1-downstream': {**short, 'model.backbone.moe.num_experts': 1},
}
