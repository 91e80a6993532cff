"""Models of images and videos: plain, hierarchical and convolutional backbones."""

from collections.abc import Callable

import torch
from zoo_transformers import Built, noise, tiny

IMAGE = {"pixel_values": noise(2, 3, 32, 32)}
VIDEO = {"pixel_values": noise(1, 4, 3, 32, 32)}
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
STAGES = {"hidden_sizes": [16, 32], "depths": [2, 2]}
PYRAMID = {
    "num_encoder_blocks": 2,
    "depths": [2, 2],
    "sr_ratios": [2, 1],
    "hidden_sizes": [16, 32],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [2, 4],
    "mlp_ratios": [2, 2],
}


def training(build: Callable[[], Built]) -> Callable[[], Built]:
    """The same in training mode, for a model that in evaluation keeps a graph from one forward to the next."""

    def build_for_training() -> Built:
        model, example = build()
        return model.train(), example

    return build_for_training


MODELS = {
    "transformers/vit": tiny("ViTForImageClassification", IMAGE, **VIT),
    "transformers/vit_masked": tiny("ViTForMaskedImageModeling", IMAGE, encoder_stride=8, **VIT),
    "transformers/deit": tiny("DeiTForImageClassificationWithTeacher", IMAGE, **VIT),
    "transformers/beit": tiny(
        "BeitForImageClassification",
        IMAGE,
        use_relative_position_bias=True,
        use_absolute_position_embeddings=True,
        **VIT,
    ),
    "transformers/data2vec_vision": tiny(
        "Data2VecVisionForImageClassification", IMAGE, use_shared_relative_position_bias=True, **VIT
    ),
    "transformers/vit_mae": tiny(
        "ViTMAEForPreTraining",
        IMAGE,
        decoder_hidden_size=24,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=40,
        **VIT,
    ),
    "transformers/vit_msn": tiny("ViTMSNForImageClassification", IMAGE, **VIT),
    "transformers/ijepa": tiny("IJepaForImageClassification", IMAGE, **VIT),
    "transformers/dinov2": tiny("Dinov2ForImageClassification", IMAGE, mlp_ratio=2, **VIT),
    "transformers/dinov2_swiglu": tiny("Dinov2ForImageClassification", IMAGE, mlp_ratio=2, use_swiglu_ffn=True, **VIT),
    "transformers/dinov2_with_registers": tiny(
        "Dinov2WithRegistersForImageClassification", IMAGE, mlp_ratio=2, num_register_tokens=3, **VIT
    ),
    "transformers/dinov3_vit": tiny("DINOv3ViTModel", IMAGE, num_register_tokens=3, use_gated_mlp=True, **VIT),
    "transformers/yolos": tiny(
        "YolosForObjectDetection", IMAGE, num_detection_tokens=5, **VIT | {"image_size": [32, 32]}
    ),
    "transformers/vitdet": tiny(
        "VitDetModel",
        IMAGE,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        mlp_ratio=2,
        image_size=32,
        pretrain_image_size=32,
        patch_size=8,
        window_size=2,
        window_block_indices=[0],
        residual_block_indices=[1],
        use_relative_position_embeddings=True,
    ),
    "transformers/dpt": tiny(
        "DPTForDepthEstimation",
        IMAGE,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 16, 24, 24],
        fusion_hidden_size=16,
        **VIT | {"num_hidden_layers": 4},
    ),
    "transformers/vivit": tiny(
        "VivitForVideoClassification", VIDEO, num_frames=4, tubelet_size=[2, 8, 8], **{**VIT, "patch_size": 8}
    ),
    "transformers/videomae": tiny("VideoMAEForVideoClassification", VIDEO, num_frames=4, tubelet_size=2, **VIT),
    "transformers/timesformer": tiny("TimesformerForVideoClassification", VIDEO, num_frames=4, **VIT),
    "transformers/swin": tiny("SwinForImageClassification", IMAGE, mlp_ratio=2.0, **SWIN),
    "transformers/swinv2": tiny("Swinv2ForImageClassification", IMAGE, mlp_ratio=2.0, **SWIN),
    "transformers/donut_swin": tiny("DonutSwinForImageClassification", IMAGE, mlp_ratio=2.0, **SWIN),
    "transformers/swin2sr": tiny(
        "Swin2SRForImageSuperResolution",
        {"pixel_values": noise(1, 3, 8, 8)},
        upscale=2,
        mlp_ratio=2.0,
        **SWIN | {"image_size": 8, "patch_size": 1},
    ),
    "transformers/hiera": tiny(
        "HieraForImageClassification",
        IMAGE,
        embed_dim=16,
        image_size=[32, 32],
        patch_size=[3, 3],
        patch_stride=[2, 2],
        patch_padding=[1, 1],
        depths=[1, 2],
        num_heads=[2, 4],
        query_stride=[2, 2],
        num_query_pool=1,
        masked_unit_size=[4, 4],
        masked_unit_attention=[True, False],
        mlp_ratio=2.0,
    ),
    "transformers/segformer": tiny("SegformerForSemanticSegmentation", IMAGE, decoder_hidden_size=24, **PYRAMID),
    "transformers/glpn": tiny("GLPNForDepthEstimation", IMAGE, decoder_hidden_size=16, **PYRAMID),
    "transformers/pvt": tiny(
        "PvtForImageClassification",
        IMAGE,
        sequence_reduction_ratios=[2, 1],
        image_size=32,
        **{key: value for key, value in PYRAMID.items() if key != "sr_ratios"} | {"patch_sizes": [4, 2]},
    ),
    "transformers/pvt_v2": tiny(
        "PvtV2ForImageClassification",
        IMAGE,
        image_size=32,
        num_encoder_blocks=2,
        depths=[2, 2],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
    ),
    "transformers/pvt_v2_linear": tiny(
        "PvtV2ForImageClassification",
        IMAGE,
        image_size=32,
        linear_attention=True,
        num_encoder_blocks=2,
        depths=[2, 2],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
    ),
    "transformers/levit": training(
        tiny(
            "LevitForImageClassificationWithTeacher",
            {"pixel_values": noise(2, 3, 64, 64)},
            image_size=64,
            hidden_sizes=[16, 24, 32],
            num_attention_heads=[2, 3, 4],
            depths=[2, 1, 1],
            key_dim=[8, 8, 8],
        )
    ),
    "transformers/cvt": tiny(
        "CvtForImageClassification",
        IMAGE,
        patch_sizes=[7, 3, 3],
        patch_stride=[4, 2, 2],
        embed_dim=[16, 24, 32],
        num_heads=[1, 2, 4],
        depth=[1, 2, 3],
        mlp_ratio=[2.0, 2.0, 2.0],
    ),
    "transformers/focalnet": tiny(
        "FocalNetForImageClassification",
        IMAGE,
        image_size=32,
        patch_size=4,
        embed_dim=16,
        hidden_sizes=[16, 32],
        depths=[2, 2],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
        mlp_ratio=2.0,
        use_layerscale=True,
    ),
    "transformers/poolformer": tiny(
        "PoolFormerForImageClassification",
        IMAGE,
        num_encoder_blocks=2,
        depths=[2, 2],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        padding=[2, 1],
        mlp_ratio=2.0,
    ),
    "transformers/swiftformer": tiny(
        "SwiftFormerForImageClassification",
        IMAGE,
        depths=[2, 2],
        embed_dims=[16, 32],
        mlp_ratio=2,
        downsamples=[True, False],
        down_patch_size=3,
    ),
    "transformers/mobilevit": tiny(
        "MobileViTForImageClassification",
        IMAGE,
        image_size=32,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
        num_attention_heads=4,
        mlp_ratio=2.0,
        expand_ratio=2.0,
    ),
    "transformers/mobilevitv2": tiny(
        "MobileViTV2ForImageClassification",
        {"pixel_values": noise(2, 3, 64, 64)},
        image_size=64,
        width_multiplier=0.125,
        base_attn_unit_dims=[64, 96, 128],
        n_attn_blocks=[1, 1, 1],
    ),
    "transformers/convnext": tiny("ConvNextForImageClassification", IMAGE, num_stages=2, **STAGES),
    "transformers/convnextv2": tiny("ConvNextV2ForImageClassification", IMAGE, num_stages=2, **STAGES),
    "transformers/resnet": tiny(
        "ResNetForImageClassification", IMAGE, embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2]
    ),
    "transformers/regnet": tiny(
        "RegNetForImageClassification", IMAGE, embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], groups_width=8
    ),
    "transformers/bit": tiny(
        "BitForImageClassification", IMAGE, embedding_size=16, hidden_sizes=[32, 64], depths=[1, 2], num_groups=4
    ),
    "transformers/mobilenet_v2": tiny(
        "MobileNetV2ForImageClassification", IMAGE, image_size=32, depth_multiplier=0.25, finegrained_output=False
    ),
    "transformers/efficientnet": tiny(
        "EfficientNetForImageClassification",
        IMAGE,
        image_size=32,
        width_coefficient=0.5,
        hidden_dim=640,
        in_channels=[32, 16],
        out_channels=[16, 24],
        kernel_sizes=[3, 3],
        strides=[1, 2],
        num_block_repeats=[1, 2],
        expand_ratios=[1, 2],
    ),
    "transformers/aimv2": tiny("Aimv2VisionModel", IMAGE, **VIT),
    "transformers/vjepa2": tiny(
        "VJEPA2ForVideoClassification",
        {"pixel_values_videos": noise(1, 4, 3, 32, 32)},
        crop_size=32,
        frames_per_clip=4,
        patch_size=8,
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2.0,
        pred_hidden_size=36,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
        pred_num_mask_tokens=1,
        num_pooler_layers=1,
    ),
    "transformers/pixtral": tiny(
        "PixtralVisionModel", {"pixel_values": noise(1, 3, 32, 32), "image_sizes": torch.tensor([[32, 32]])}, **VIT
    ),
    "transformers/hgnet_v2": tiny(
        "HGNetV2ForImageClassification",
        IMAGE,
        stem_channels=[3, 8, 8],
        hidden_sizes=[16] * 4,
        depths=[1] * 4,
        stage_in_channels=[8, 16, 16, 16],
        stage_mid_channels=[8] * 4,
        stage_out_channels=[16] * 4,
        stage_num_blocks=[1] * 4,
        stage_numb_of_layers=[2] * 4,
    ),
    "transformers/textnet": tiny("TextNetForImageClassification", IMAGE, stem_out_channels=8, hidden_sizes=[8] * 5),
}
