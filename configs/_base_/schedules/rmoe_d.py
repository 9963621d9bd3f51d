# RMoE-D: a dense checkpoint is upcycled and fine-tuned on the downstream task.
# In the first stage, with the warm-up, only the core and the new head train, at
# the cost of a dense model. Then everything trains. The paper does not say
# which roles train when. Of the orders that docs/results.md compares for eight
# experts, this one has the highest mean, but the difference is smaller than the
# noise. Four experts did better without the core stage.
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
