# Adaptive compute (V-MoE, 2106.05974): ViT-Ti with ImageNet-21k weights,
# upcycled and briefly fine-tuned on CamVid, then evaluated at many capacities,
# filled in order and by priority.
dense = '../vit_moe/vit-tiny-patch16-in21k-pre_upernet_1xb4-1k_camvid-256x256.py'
moe = '../vit_moe/vit-tiny-patch16-moe-e8k1-in21k-pre_upernet_1xb4-1k_camvid-256x256.py'
steps = {'non-moe': dense, 'k1': moe, 'k2': moe, 'k2-bpr-0.5': moe}
pipelines = {name: [name] for name in steps}
bf16 = {'optim_wrapper.type': 'rmoe.BFloat16OptimWrapper'}
joint = {
    **bf16, 'custom_hooks': [
        dict(type='rmoe.MoELossHook'),
        dict(type='rmoe.RoutingStatsHook', interval=100)
    ]
}
router = 'model.backbone.moe.router'
options = {
    'non-moe': bf16,
    'k1': joint,
    'k2': {**joint, router: dict(type='TokenChoiceRouter', top_k=2)},
    # Trained as it is to be used: half of the choices find room.
    'k2-bpr-0.5': {
        **joint, 'model.backbone.moe.unrouted': 'zero',
        router: dict(
            type='TokenChoiceRouter', top_k=2, capacity_factor=0.5,
            priority='bpr')
    },
}
analyse = {
    'k1': ['capacity_sweep', 'specialisation'],
    'k2': ['capacity_sweep'],
    'k2-bpr-0.5': ['capacity_sweep']
}
