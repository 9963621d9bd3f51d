# schedule_160k.py with a layer-wise decay of the learning rate, with which MAE
# and BEiT fine-tune a ViT.
_base_ = './schedule_160k.py'
optim_wrapper = dict(
    optimizer=dict(lr=0.0001, weight_decay=0.05),
    paramwise_cfg=dict(
        layer_decay_rate=0.75,
        norm_decay_mult=0.,
        custom_keys=dict(
            pos_embed=dict(decay_mult=0.), cls_token=dict(decay_mult=0.))))
