# RMoE-D: a dense checkpoint, upcycled and fine-tuned on the downstream task.
# A new head and the warm-up meet a dense model, at its cost; then everything
# trains. The paper does not say who trains when: of the orders compared in
# docs/results.md this one has the highest mean, by less than its noise (eight
# experts; four did better without a core stage).
custom_hooks = [
    dict(
        type='rmoe.ResidualMoEHook',
        stages=[
            dict(name='core', roles=('core', 'head'), end=0.2),
            dict(name='joint', roles='all'),
        ]),
    dict(type='rmoe.MoELossHook'),
    dict(type='rmoe.RoutingStatsHook', interval=100),
]
