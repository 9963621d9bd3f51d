# RMoE (2204.09636) with a small CvT: the four pipelines, from random weights to
# CamVid. Upstream runs take most of the time, so all seeds share them. A fifth
# pipeline is 'rmoe-d' with a single expert. Its router has nothing to choose,
# but Adam updates both core and residual, as in 'rmoe-d'. So what it gains does
# not come from experts.
_base_ = '../pipelines/cvt-xtiny_camvid-256x256.py'
once = ['dense-upstream', 'moe-upstream', 'rmoe-i-upstream']
bf16 = {'optim_wrapper.type': 'rmoe.BFloat16OptimWrapper'}
# Half of the iterations of the configs. To make up for it, the new head has
# five times the learning rate.
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
