# Experts and all else train together from the first iteration: a MoE model
# from scratch, or one whose experts learned before.
custom_hooks = [
    dict(type='rmoe.MoELossHook'),
    dict(type='rmoe.RoutingStatsHook', interval=100),
]
