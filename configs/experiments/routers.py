# The routers of 2401.15969 at equal compute: one epoch upstream from one dense
# checkpoint (that of rmoe-swin.py, --dense), then CamVid. The dense model goes
# on for as long.
routers = {
    'softmax-token-choice': dict(type='TokenChoiceRouter'),
    'sinkhorn-token-choice': dict(type='SinkhornTokenChoiceRouter'),
    'softmax-expert-choice': dict(type='ExpertChoiceRouter'),
    'sinkhorn-expert-choice': dict(type='SinkhornExpertChoiceRouter'),
    'sparse-expert-choice': dict(type='SparseExpertChoiceRouter'),
    'soft-moe': dict(type='SoftRouter'),
}
pipelines = {
    name: ['dense-upstream', f'{name}-upstream', f'{name}-downstream']
    for name in ('dense-continued', *routers)
}
upstream = '../swin_moe/swin-xtiny-patch4-window4-moe-e8k1_1xb64-1e-intermediate_tiny-imagenet-100-64x64.py'
downstream = '../swin_moe/swin-xtiny-patch4-window4-moe-e8k1_upernet_1xb4-1k-rmoe-i_camvid-256x256.py'
steps = {
    f'{name}-{level}': path
    for name in ('dense-continued', *routers)
    for level, path in (('upstream', upstream), ('downstream', downstream))
}
bf16 = {'optim_wrapper.type': 'rmoe.BFloat16OptimWrapper'}
dense = {**bf16, 'model.backbone.moe': None, 'custom_hooks': []}
joint = {
    **bf16, 'custom_hooks': [
        dict(type='rmoe.MoELossHook'),
        dict(type='rmoe.RoutingStatsHook', interval=100)
    ]
}
steps['dense-upstream'] = '../swin_moe/swin-xtiny-patch4-window4_1xb64-7e_tiny-imagenet-100-64x64.py'
options = {
    'dense-continued-upstream': dense,
    'dense-continued-downstream': dense,
    **{
        f'{name}-{level}': {**joint, 'model.backbone.moe.router': router}
        for name, router in routers.items()
        for level in ('upstream', 'downstream')
    }
}
