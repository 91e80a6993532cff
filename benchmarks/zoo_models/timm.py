"""timm's models by its own classes, two blocks a stage and narrow."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import timm.models as zoo
import torch
from timm.layers import ClassifierHead, SwiGLU
from timm.models import (
    byobnet,
    coat,
    densenet,
    efficientnet,
    efficientvit_mit,
    efficientvit_msra,
    focalnet,
    ghostnet,
    maxxvit,
    metaformer,
    mlp_mixer,
    mobilenetv3,
    mobilevit,
    mvitv2,
    nextvit,
    nfnet,
    regnet,
    resnet,
    swin_transformer_v2_cr,
    vision_transformer,
    vision_transformer_sam,
)
from timm.models._efficientnet_builder import decode_arch_def
from torch import nn

Built = tuple[nn.Module, Any]


def _image(kind: Callable[..., nn.Module], size: int = 32, **arguments: Any) -> Callable[[], Built]:
    """A classifier of ten classes, and two images of that size."""

    def build() -> Built:
        return kind(num_classes=10, **arguments), torch.randn(2, 3, size, size)

    return build


def _nextvit(num_classes: int) -> nn.Module:
    """A stage of NextViT, whose own widths are fixed."""
    kinds = [nextvit.NextConvBlock, nextvit.NextTransformerBlock]
    stage = nextvit.NextStage(16, [32, 128], kinds, sr_ratio=2, mix_block_ratio=0.75, head_dim=8)
    head = ClassifierHead(128, num_classes)
    return nn.Sequential(OrderedDict(stem=nextvit.ConvNormAct(3, 16, stride=2), stage=stage, head=head))


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
FOUR = {"depths": (2, 2, 2, 2)}
WIDTHS = (16, 24, 32, 40)

MODELS: dict[str, Callable[[], Built]] = {
    # one resolution
    "timm/vit": _image(zoo.VisionTransformer, **VIT),
    "timm/vit-qk-norm-map": _image(
        zoo.VisionTransformer, **VIT, qk_norm=True, init_values=0.1, reg_tokens=2, class_token=False, global_pool="map"
    ),
    "timm/vit-swiglu": _image(zoo.VisionTransformer, **VIT, mlp_layer=SwiGLU, scale_attn_norm=True, pre_norm=True),
    "timm/vit-parallel": _image(zoo.VisionTransformer, **VIT, block_fn=vision_transformer.ParallelScalingBlock),
    "timm/vit-relpos": _image(zoo.VisionTransformerRelPos, **VIT),
    "timm/vit-relpos-bias": _image(zoo.VisionTransformerRelPos, **VIT, rel_pos_type="bias"),
    "timm/vit-sam": _image(
        vision_transformer_sam.VisionTransformerSAM,
        **VIT,
        use_rel_pos=True,
        window_size=2,
        global_attn_indexes=(1,),
        neck_chans=24,
    ),
    "timm/deit-distilled": _image(zoo.VisionTransformerDistilled, **VIT),
    "timm/beit": _image(zoo.Beit, **VIT, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1),
    "timm/beit-swiglu-shared": _image(zoo.Beit, **VIT, swiglu_mlp=True, scale_mlp=True, use_shared_rel_pos_bias=True),
    "timm/eva": _image(zoo.Eva, **VIT),
    "timm/eva02": _image(
        zoo.Eva, **VIT, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True, use_rot_pos_emb=True
    ),
    "timm/cait": _image(zoo.Cait, **VIT),
    "timm/xcit": _image(zoo.Xcit, **VIT, eta=1.0),
    "timm/convit": _image(zoo.ConVit, **VIT, local_up_to_layer=1),
    "timm/tnt": _image(
        zoo.TNT, img_size=32, patch_size=8, embed_dim=32, inner_dim=16, depth=2, num_heads_inner=2, num_heads_outer=4
    ),
    "timm/crossvit": _image(
        zoo.CrossVit,
        img_size=32,
        patch_size=(4, 8),
        embed_dim=(16, 32),
        depth=((1, 2, 0), (1, 2, 0)),
        num_heads=(2, 2),
        mlp_ratio=(2.0, 2.0, 1.0),
    ),
    "timm/mixer": _image(zoo.MlpMixer, img_size=32, patch_size=8, num_blocks=2, embed_dim=32),
    "timm/resmlp": _image(
        zoo.MlpMixer,
        img_size=32,
        patch_size=8,
        num_blocks=2,
        embed_dim=32,
        mlp_ratio=4,
        block_layer=mlp_mixer.ResBlock,
        norm_layer=mlp_mixer.Affine,
    ),
    "timm/gmlp": _image(
        zoo.MlpMixer,
        img_size=32,
        patch_size=8,
        num_blocks=2,
        embed_dim=32,
        mlp_ratio=6,
        block_layer=mlp_mixer.SpatialGatingBlock,
        mlp_layer=mlp_mixer.GatedMlp,
    ),
    # several resolutions
    "timm/swin": _image(zoo.SwinTransformer, **SWIN),
    "timm/swinv2": _image(zoo.SwinTransformerV2, **SWIN),
    "timm/swinv2-cr": _image(swin_transformer_v2_cr.SwinTransformerV2Cr, **SWIN),
    "timm/pvt-v2": _image(
        zoo.PyramidVisionTransformerV2,
        depths=(1, 1, 2, 1),
        embed_dims=WIDTHS,
        num_heads=(1, 2, 4, 5),
        mlp_ratios=(2, 2, 2, 2),
        size=64,
    ),
    "timm/pvt-v2-linear": _image(
        zoo.PyramidVisionTransformerV2,
        depths=(1, 1, 2, 1),
        embed_dims=WIDTHS,
        num_heads=(1, 2, 4, 5),
        mlp_ratios=(2, 2, 2, 2),
        linear=True,
        size=64,
    ),
    "timm/twins-pcpvt": _image(
        zoo.Twins, img_size=64, embed_dims=WIDTHS, num_heads=(1, 2, 4, 5), depths=(1, 1, 2, 1), size=64
    ),
    "timm/twins-svt": _image(
        zoo.Twins,
        img_size=64,
        embed_dims=WIDTHS,
        num_heads=(1, 2, 4, 5),
        depths=(2, 2, 2, 2),
        wss=(2, 2, 2, 2),
        size=64,
    ),
    "timm/levit": _image(
        zoo.Levit,
        img_size=64,
        embed_dim=(32, 48),
        key_dim=8,
        depth=(2, 2),
        num_heads=(2, 3),
        size=64,
    ),
    "timm/pit": _image(
        zoo.PoolingVisionTransformer,
        img_size=32,
        patch_size=8,
        stride=4,
        base_dims=(8, 8),
        depth=(2, 2),
        heads=(2, 4),
        mlp_ratio=2,
    ),
    "timm/hiera": _image(
        zoo.Hiera,
        img_size=(64, 64),
        embed_dim=16,
        stages=(1, 2, 1),
        q_pool=2,
        mask_unit_size=(4, 4),
        size=64,
        mask_unit_attn=(True, False, False),
    ),
    "timm/mvitv2": _image(
        lambda **more: mvitv2.MultiScaleVit(
            mvitv2.MultiScaleVitCfg(
                depths=(1, 2), embed_dim=16, num_heads=1, stride_q=((1, 1), (2, 2)), stride_kv_adaptive=(2, 2)
            ),
            img_size=32,
            **more,
        )
    ),
    "timm/davit": _image(zoo.DaVit, depths=(1, 1), embed_dims=(16, 32), num_heads=(2, 4), window_size=4, mlp_ratio=2),
    "timm/focalnet": _image(
        focalnet.FocalNet, embed_dim=16, depths=(2, 2), focal_levels=(2, 2), focal_windows=(3, 3), mlp_ratio=2.0
    ),
    "timm/gcvit": _image(
        zoo.GlobalContextVit,
        img_size=64,
        window_size=(4, 4, 4, 2),
        embed_dim=16,
        depths=(2, 2, 2, 2),
        num_heads=(2, 2, 4, 4),
        size=64,
    ),
    "timm/nest": _image(
        zoo.Nest, img_size=32, patch_size=4, num_levels=2, embed_dims=(16, 32), num_heads=(2, 4), depths=(2, 2)
    ),
    "timm/volo": _image(
        zoo.VOLO,
        img_size=32,
        layers=(2, 2, 0, 0),
        embed_dims=(16, 32, 32, 32),
        num_heads=(2, 4, 4, 4),
        stem_hidden_dim=8,
    ),
    "timm/coat": _image(
        coat.CoaT,
        img_size=64,
        patch_size=4,
        embed_dims=(16, 32, 32, 32),
        serial_depths=(1, 1, 1, 1),
        parallel_depth=1,
        num_heads=4,
        mlp_ratios=(2, 2, 2, 2),
        crpe_window={3: 1, 5: 1, 7: 2},
        size=64,
    ),
    "timm/edgenext": _image(zoo.EdgeNeXt, dims=(16, 24, 32, 40), depths=(2, 2, 2, 2), heads=(4, 4, 4, 4), size=64),
    "timm/tiny-vit": _image(
        zoo.TinyVit,
        embed_dims=(16, 24, 32, 40),
        depths=(1, 2, 2, 2),
        num_heads=(1, 2, 4, 4),
        window_sizes=(4, 4, 4, 2),
        size=64,
    ),
    "timm/mobilevit": _image(
        lambda **more: byobnet.ByobNet(
            byobnet.ByoModelCfg(
                blocks=(
                    mobilevit._inverted_residual_block(d=1, c=16, s=2, br=2.0),
                    mobilevit._mobilevit_block(
                        d=2, c=24, s=2, transformer_dim=32, transformer_depth=2, patch_size=2, br=2.0
                    ),
                ),
                stem_chs=8,
                stem_type="3x3",
                stem_pool="",
                downsample="",
                act_layer="silu",
                num_features=48,
            ),
            **more,
        ),
        size=64,
    ),
    "timm/mobilevitv2": _image(
        lambda **more: byobnet.ByobNet(
            byobnet.ByoModelCfg(
                blocks=(
                    mobilevit._inverted_residual_block(d=1, c=16, s=2, br=2.0),
                    mobilevit._mobilevitv2_block(d=2, c=24, s=2, transformer_depth=2, br=2.0),
                ),
                stem_chs=8,
                stem_type="3x3",
                stem_pool="",
                downsample="",
                act_layer="silu",
            ),
            **more,
        ),
        size=64,
    ),
    "timm/coatnet": _image(
        lambda **more: maxxvit.MaxxVit(
            maxxvit.MaxxVitCfg(
                embed_dim=(16, 24, 32, 48),
                depths=(1, 1, 2, 1),
                block_type=("C", "C", "T", "T"),
                stem_width=8,
                transformer_cfg=maxxvit.MaxxVitTransformerCfg(dim_head=8),
            ),
            img_size=64,
            **more,
        ),
        size=64,
    ),
    "timm/maxvit": _image(
        lambda **more: maxxvit.MaxxVit(
            maxxvit.MaxxVitCfg(
                embed_dim=(16, 32),
                depths=(1, 1),
                block_type=("M", "M"),
                stem_width=8,
                transformer_cfg=maxxvit.MaxxVitTransformerCfg(dim_head=8, window_size=(4, 4), grid_size=(4, 4)),
            ),
            img_size=64,
            **more,
        ),
        size=64,
    ),
    "timm/efficientvit-mit": _image(
        efficientvit_mit.EfficientVit,
        widths=(8, 16, 24, 32),
        depths=(1, 1, 1, 1),
        head_dim=8,
        head_widths=(48, 40),
        size=64,
    ),
    "timm/efficientvit-msra": _image(
        efficientvit_msra.EfficientVitMsra,
        img_size=64,
        embed_dim=(16, 32, 48),
        key_dim=(4, 4, 4),
        depth=(1, 1, 2),
        num_heads=(2, 2, 2),
        window_size=(4, 4, 4),
        kernels=(3, 3),
        size=64,
    ),
    "timm/nextvit": _image(_nextvit),
    # without attention
    "timm/poolformer": _image(metaformer.MetaFormer, depths=(1, 1, 1, 1), dims=WIDTHS, layer_scale_init_values=1e-5),
    "timm/caformer": _image(
        metaformer.MetaFormer,
        depths=(1, 1, 1, 1),
        dims=(16, 32, 32, 64),
        token_mixers=(metaformer.SepConv,) * 2 + (metaformer.Attention,) * 2,
        norm_layers=(metaformer.LayerNorm2dNoBias,) * 2 + (metaformer.LayerNormNoBias,) * 2,
    ),
    "timm/convnext": _image(zoo.ConvNeXt, **FOUR, dims=WIDTHS),
    "timm/convnextv2": _image(zoo.ConvNeXt, **FOUR, dims=WIDTHS, use_grn=True, ls_init_value=None, conv_mlp=True),
    "timm/resnet": _image(
        resnet.ResNet,
        block=resnet.Bottleneck,
        layers=(2, 1, 1, 1),
        channels=(8, 8, 16, 16),
        block_args={"attn_layer": "se"},
    ),
    "timm/densenet": _image(densenet.DenseNet, growth_rate=8, block_config=(2, 2)),
    "timm/efficientnet": _image(
        efficientnet.EfficientNet,
        block_args=decode_arch_def([["ds_r1_k3_s1_e1_c16_se0.25"], ["ir_r2_k5_s2_e4_c24_se0.25"]]),
        num_features=48,
        stem_size=8,
    ),
    "timm/mobilenetv3": _image(
        mobilenetv3.MobileNetV3,
        block_args=decode_arch_def([["ds_r1_k3_s2_e1_c16_se0.25"], ["ir_r2_k3_s2_e4_c24"], ["cn_r1_k1_s1_c48"]]),
        num_features=64,
        stem_size=8,
    ),
    "timm/ghostnet": _image(
        ghostnet.GhostNet, cfgs=[[[3, 16, 16, 0, 1]], [[3, 48, 24, 0.25, 2]], [[3, 72, 24, 0, 1]]], width=0.5
    ),
    "timm/regnet": _image(
        lambda **more: regnet.RegNet(
            regnet.RegNetCfg(w0=8, wa=8.0, wm=1.5, group_size=8, depth=6, se_ratio=0.25, stem_width=8), **more
        )
    ),
    "timm/nfnet": _image(
        lambda **more: nfnet.NormFreeNet(
            nfnet.NfCfg(
                depths=(1, 1),
                channels=(16, 32),
                stem_type="3x3",
                stem_chs=8,
                group_size=8,
                attn_layer="se",
                attn_kwargs={"rd_ratio": 0.5},
                num_features=32,
                skipinit=True,
            ),
            **more,
        )
    ),
}
