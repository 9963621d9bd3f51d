_base_ = ['./cvt-xtiny_upernet_1xb4-1k_camvid-256x256.py', '../_base_/schedules/rmoe_d.py']
model = dict(backbone=dict(moe=dict(layers=((), (1, ), (1, 3, 5)), num_experts=8)))
