# Measures what makes experts worth their cost, with ViT-Ti on CamVid. Every
# variant starts from the weights of 'start', with its head, and gets the images
# of its seed in the same order with the same augmentation, so that runs with
# the same seed differ in nothing else. Only two variants have stochastic depth:
# routers draw random numbers too, so that it would drop other paths than in the
# dense model. There are 600 iterations instead of the 1,000 of the config, with
# a learning rate that falls to zero at the end, and five seeds. In the variants
# '*-cut' a half of each FFN serves all tokens, and only the other half has
# experts. The variants 'head-*' have a decode head with a FFN, which has experts
# instead of the backbone.
names = (
    'dense', 'dense-ffn2', 'dense-sgd', 'e1', 'e4', 'e4-half', 'e4-zero-mean',
    'e4-clusters', 'e4-no-core', 'e4-straight', 'e4-averaged', 'e4-merged',
    'e4-shared-moments', 'e8-sqrt', 'e8-k2', 'dense-tail', 'e4-tail',
    'dense-long', 'e1-long', 'e4-straight-long', 'dense-drop', 'e4-drop')
cuts = ('e2-cut', 'e8-cut')
heads = ('head-dense', 'head-e1', 'head-e4')
pipelines = {
    **{name: ['start', name] for name in (*names, *cuts)},
    **{name: ['head-start', name] for name in heads}
}
DENSE = '../vit_moe/vit-tiny-patch16-in21k-pre_fcn_1xb4-1k_camvid-256x256.py'
MOE = '../vit_moe/vit-tiny-patch16-moe-e8k1-in21k-pre_fcn_1xb4-1k_camvid-256x256.py'
steps = {
    name: MOE if name.startswith('e') else DENSE
    for name in ('start', *names, *cuts, 'head-start', *heads)
}
short = {
    'optim_wrapper.type': 'rmoe.BFloat16OptimWrapper',
    'param_scheduler.1.end': 600,
    'train_cfg.max_iters': 600,
    'train_cfg.val_interval': 600
}
with_drop = {**short, 'model.backbone.drop_path_rate': 0.1}
hooks = [
    dict(type='rmoe.MoELossHook'),
    dict(type='rmoe.RoutingStatsHook', interval=100)
]
experts = 'model.backbone.moe.num_experts'
align = 'model.backbone.moe.align'
keys = 'optim_wrapper.paramwise_cfg.custom_keys'
residuals = 'optim_wrapper.paramwise_cfg.roles.residual'
# The names of the dense FFNs that are MoE in other variants.
blocks = [f'layers.{block}.ffn.layers.' for block in (7, 9, 11)]
norms = {'norm': dict(decay_mult=0.)}
# The last fifth of the training has a hundredth of the learning rate.
tail = {
    'param_scheduler.1.end': 480,
    'param_scheduler.1.eta_min': 5e-6
}
long = {
    'param_scheduler.1.end': 1500,
    'train_cfg.max_iters': 1500,
    'train_cfg.val_interval': 1500
}


def moe(number, *more, base=short):
    return {**base, 'custom_hooks': [*hooks, *more], experts: number}


def rate(factor):
    return {keys: {**norms, **{key: dict(lr_mult=factor) for key in blocks}}}


# One iteration with learning rate zero, whose checkpoint has the randomly
# initialised head.
start = {
    **with_drop, 'param_scheduler': [],
    'optim_wrapper.optimizer.lr': 0.,
    'optim_wrapper.optimizer.weight_decay': 0.,
    'train_cfg.max_iters': 1,
    'train_cfg.val_interval': 1
}
FFN_HEAD = dict(
    type='FFNHead', in_channels=192, channels=192, kernel_size=1, num_convs=1,
    concat_input=False, dropout_ratio=0.0, num_classes=11,
    norm_cfg=dict(type='BN'), align_corners=False,
    loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0))


def module(name):
    """Import a file that is beside run.py; the path is relative to the folder
    of train.py."""
    return {'custom_imports': dict(imports=[f'experiments.{name}'])}


dense_head = {
    **module('ffn_head'), 'model.decode_head': dict(_delete_=True, **FFN_HEAD)
}


def moe_head(number):
    """So many experts in the FFN of the head, which have its learning rate."""
    return {
        **module('ffn_head'), 'model.decode_head': dict(
            _delete_=True, type='rmoe.UpcycledBackbone', backbone=FFN_HEAD,
            moe=dict(layers=[0], num_experts=number)),
        'custom_hooks': hooks, 'optim_wrapper.paramwise_cfg.roles': {
            role: dict(lr_mult=5.0)
            for role in ('head', 'residual', 'router')
        }
    }


def cut(number):
    """So many experts for each quarter of the hidden units, and none for the
    other half of them."""
    return {
        **module('cut_ffn'), **moe(number), 'model.backbone.type': 'CutViT'
    }


options = {
    'start': start,
    'head-start': {**start, **dense_head},
    'head-dense': {**short, **dense_head},
    'head-e1': {**short, **moe_head(1)},
    'head-e4': {**short, **moe_head(4)},
    'dense': short,
    # Adam updates core and residual, so that their sum moves twice as fast as a
    # dense weight. Here the dense FFNs have twice the learning rate.
    'dense-ffn2': {**short, **rate(2.)},
    # The fine-tuning of V-MoE (2106.05974): SGD with momentum 0.9, learning
    # rate 0.003, gradients clipped at 10, no weight decay. As in the others,
    # layers and the head have their own multiples of the learning rate.
    'dense-sgd': {
        **short,
        'optim_wrapper.optimizer': dict(
            _delete_=True, type='SGD', lr=0.003, momentum=0.9, weight_decay=0.),
        'optim_wrapper.clip_grad.max_norm': 10.
    },
    'e1': moe(1),
    'e4': moe(4),
    # The sum of core and residual moves as fast as a dense weight.
    'e4-half': {
        **moe(4), **rate(.5),
        residuals: dict(lr_mult=.5)
    },
    'e4-zero-mean': moe(4, dict(type='rmoe.ZeroMeanHook')),
    'e4-clusters': moe(4),
    # Without a core each expert has only one weight that is updated.
    'e4-no-core': {**moe(4), 'model.backbone.moe.core': False},
    # The gradient of experts is that of the output as it was computed, not
    # multiplied by the gates.
    'e4-straight': {**moe(4), align: 'straight_through'},
    # Experts are pulled to their mean at the beginning, or at the end
    # (2308.06093). In the second case the mean, a dense model, is the result.
    'e4-averaged': moe(4, dict(
        type='rmoe.ExpertAveragingHook', first=.1, last=0.)),
    'e4-merged': moe(4, dict(
        type='rmoe.ExpertAveragingHook', first=0., last=.1)),
    'e4-shared-moments': moe(4, dict(type='rmoe.SharedMomentsHook')),
    # Each expert gets an eighth of the tokens, so its learning rate is
    # multiplied by sqrt(1/8).
    'e8-sqrt': {
        **moe(8),
        residuals: dict(lr_mult=8**-.5)
    },
    # Each token has two experts, of which some can be given up at test time.
    'e8-k2': {
        **moe(8), 'model.backbone.moe.router': dict(
            type='TokenChoiceRouter', top_k=2)
    },
    # A token has two of eight experts, each with a quarter of the hidden units.
    'e2-cut': cut(1),
    'e8-cut': cut(4),
    'dense-tail': {**short, **tail},
    'e4-tail': {**moe(4), **tail},
    'dense-long': {**short, **long},
    'e1-long': {**moe(1), **long},
    'e4-straight-long': {**moe(4), **long, align: 'straight_through'},
    'dense-drop': with_drop,
    'e4-drop': moe(4, base=with_drop)
}
# Routers start from clusters of tokens, so that similar tokens go to the same
# expert.
upcycle = {
    'e4-clusters': [
        '--cluster-routers', '--images', 'data/camvid/img_dir/train', '--size',
        '128'
    ]
}
analyse = {
    **{name: ['rescore'] for name in names},
    'e8-k2': ['rescore', 'capacity_sweep']
}
