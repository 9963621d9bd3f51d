# The runtime settings of classifiers, which train by epochs and need neither
# mmseg nor mmdet.
default_scope = 'mmengine'
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'))
vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(
    type='Visualizer', vis_backends=vis_backends, name='visualizer')
log_processor = dict(by_epoch=True)
log_level = 'INFO'
load_from = None
resume = False
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='rmoe.CheckpointHook', interval=1, max_keep_ckpts=2,
        save_best='accuracy/top1'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    class_check=dict(type='rmoe.ClassCheckHook'),
    cost=dict(type='rmoe.CostHook'),
    report=dict(type='rmoe.ReportHook'))
