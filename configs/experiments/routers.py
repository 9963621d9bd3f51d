# The routers of 2401.15969 at equal compute, in upstream training. Each starts
# from the same dense checkpoint (that of rmoe-swin.py, given with --dense) and
# trains one more epoch of Tiny-ImageNet-100, and so does the dense model.
routers = {
    'softmax-token-choice': dict(type='TokenChoiceRouter'),
    'sinkhorn-token-choice': dict(type='SinkhornTokenChoiceRouter'),
    'softmax-expert-choice': dict(type='ExpertChoiceRouter'),
    'sinkhorn-expert-choice': dict(type='SinkhornExpertChoiceRouter'),
    'sparse-expert-choice': dict(type='SparseExpertChoiceRouter'),
    # This gives as many slots as an image has tokens in the third stage.
    'soft-moe': dict(type='SoftRouter', slots_per_expert=2),
}
names = ('dense-continued', *routers)
pipelines = {name: ['dense-upstream', name] for name in names}
steps = {
    name: '../swin_moe/swin-xtiny-patch4-window4-moe-e8k1_1xb64-1e-intermediate_tiny-imagenet-100-64x64.py'
    for name in names
}
steps['dense-upstream'] = '../swin_moe/swin-xtiny-patch4-window4_1xb64-7e_tiny-imagenet-100-64x64.py'
bf16 = {'optim_wrapper.type': 'rmoe.BFloat16OptimWrapper'}
joint = {
    **bf16, 'custom_hooks': [
        dict(type='rmoe.MoELossHook'),
        dict(type='rmoe.RoutingStatsHook', interval=100)
    ]
}
options = {
    'dense-continued': {**bf16, 'model.backbone.moe': None, 'custom_hooks': []},
    **{
        name: {**joint, 'model.backbone.moe.router': router}
        for name, router in routers.items()
    }
}
