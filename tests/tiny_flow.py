"""Tiny pipelines of the newer image models, built from configs, the same every time: transformers in place of UNets, each with its own encoders."""

import torch

CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
QWEN_EXTRA = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def t5_tokenizer():
    """A T5 tokenizer that knows letters."""
    from transformers import T5Tokenizer

    letters = [(chr(code), -9.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), *letters], extra_ids=0, model_max_length=512)


def qwen_tokenizer():
    """A Qwen tokenizer that knows bytes, with a chat template."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    made = Qwen2Tokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[], model_max_length=2048, extra_special_tokens=QWEN_EXTRA)
    made.chat_template, made.eos_token = CHAT, "<|im_end|>"
    return made


def gemma_tokenizer():
    """A Gemma tokenizer that knows letters and bytes."""
    from transformers import GemmaTokenizer

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{code:02X}>" for code in range(256)), "▁", *(chr(code) for code in range(33, 127))]
    return GemmaTokenizer(vocab={token: number for number, token in enumerate(dict.fromkeys(tokens))}, merges=[], model_max_length=300, add_bos_token=True)


def _t5(width: int, seed: int, kind: str = "T5"):
    import transformers

    words = t5_tokenizer()
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(words), d_model=width, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return getattr(transformers, f"{kind}EncoderModel")(config).eval(), words


def _qwen3(kind: str, seed: int, layers: int):
    import transformers

    words = qwen_tokenizer()
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=1024, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    return getattr(transformers, kind)(config).eval(), words


def _gemma(seed: int):
    from transformers import Gemma2Config, Gemma2Model

    words = gemma_tokenizer()
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=len(words), head_dim=4, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=2, num_key_value_heads=2,
    )  # fmt: skip
    return Gemma2Model(config).eval(), words


def _vae(seed: int, widths=(8, 16), **more):
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * len(widths), up_block_types=["UpDecoderBlock2D"] * len(widths),
        block_out_channels=list(widths), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32, **more,
    ).eval()  # fmt: skip


def _euler(**more):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**more)


def sd3(seed: int = 0):
    """Stable Diffusion 3.5, with its second attention in the first block."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    from tests import tiny_image

    words = tiny_image.tokenizer()
    first, second = (tiny_image._text_encoder(words, seed=seed + number, projection=True) for number in (0, 1))
    third, pieces = _t5(32, seed)
    torch.manual_seed(seed)
    part = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16,
        joint_attention_dim=32, pooled_projection_dim=32, qk_norm="rms_norm", dual_attention_layers=(0,),
    ).eval()  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=part, scheduler=_euler(shift=3.0), vae=_vae(seed, shift_factor=0.0609, scaling_factor=1.5305), text_encoder=first, tokenizer=words,
        text_encoder_2=second, tokenizer_2=words, text_encoder_3=third, tokenizer_3=pieces,
    )  # fmt: skip


def flux(seed: int = 0):
    """FLUX.1 dev, which takes its guidance as an input."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    from tests import tiny_image

    words = tiny_image.tokenizer()
    second, pieces = _t5(16, seed)
    torch.manual_seed(seed)
    part = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        pooled_projection_dim=16, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    ).eval()  # fmt: skip
    return FluxPipeline(
        transformer=part, scheduler=_euler(shift=3.0, use_dynamic_shifting=True), vae=_vae(seed, shift_factor=0.1159, scaling_factor=0.3611),
        text_encoder=tiny_image._text_encoder(words, seed=seed), tokenizer=words, text_encoder_2=second, tokenizer_2=pieces,
    )  # fmt: skip


def flux2(seed: int = 0):
    """FLUX.2 klein; its text encoder is deep enough for the layers that the pipeline reads."""
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel

    encoder, words = _qwen3("Qwen3ForCausalLM", seed, layers=28)
    torch.manual_seed(seed)
    part = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=48,
        timestep_guidance_channels=64, axes_dims_rope=[4, 4, 4, 4], guidance_embeds=False,
    ).eval()  # fmt: skip
    vae = AutoencoderKLFlux2(
        sample_size=32, in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2, use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip
    vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2.0, 16))
    return Flux2KleinPipeline(transformer=part, scheduler=_euler(use_dynamic_shifting=True), vae=vae, text_encoder=encoder, tokenizer=words)


def qwen_image(seed: int = 0):
    """Qwen-Image, with the VAE of films."""
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    words = qwen_tokenizer()
    number = words.convert_tokens_to_ids
    torch.manual_seed(seed)
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            rope_scaling=dict(mrope_section=[1, 1, 2], rope_type="default", type="default"), rope_theta=1e6, bos_token_id=None,
            eos_token_id=words.eos_token_id,
        ),
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16),
        vision_start_token_id=number("<|vision_start|>"), vision_end_token_id=number("<|vision_end|>"), image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
    )).eval()  # fmt: skip
    part = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        guidance_embeds=False, axes_dims_rope=(8, 4, 4),
    ).eval()  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True], latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.0, 2.0],
    ).eval()  # fmt: skip
    return QwenImagePipeline(transformer=part, scheduler=_euler(use_dynamic_shifting=True), vae=vae, text_encoder=encoder, tokenizer=words)


def z_image(seed: int = 0):
    """Z-Image."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    encoder, words = _qwen3("Qwen3Model", seed, layers=2)
    torch.manual_seed(seed)
    part = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, norm_eps=1e-5,
        qk_norm=True, cap_feat_dim=16, rope_theta=256.0, t_scale=1000.0, axes_dims=[8, 4, 4], axes_lens=[1024, 32, 32],
    ).eval()  # fmt: skip
    with torch.no_grad():  # diffusers leaves these two uninitialised
        part.x_pad_token.fill_(0.5)
        part.cap_pad_token.fill_(-0.5)
    vae = _vae(seed, shift_factor=0.1159, scaling_factor=0.3611)
    return ZImagePipeline(transformer=part, scheduler=_euler(shift=3.0), vae=vae, text_encoder=encoder, tokenizer=words)


def sana(seed: int = 0):
    """Sana, with the solver that it is shipped with."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    encoder, words = _gemma(seed)
    torch.manual_seed(seed)
    part = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4, num_cross_attention_heads=2,
        cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8, sample_size=32,
    ).eval()  # fmt: skip
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1],
        downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407,
    ).eval()  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(transformer=part, scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=words)


def lumina2(seed: int = 0):
    """Lumina Image 2; its pipeline takes it that the VAE makes eight pixels one."""
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    encoder, words = _gemma(seed)
    torch.manual_seed(seed)
    part = Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_attention_heads=3, num_kv_heads=1, multiple_of=16,
        ffn_dim_multiplier=None, norm_eps=1e-5, scaling_factor=1.0, axes_dim_rope=[4, 2, 2], axes_lens=[512, 64, 64], cap_feat_dim=8,
    ).eval()  # fmt: skip
    vae = _vae(seed, (4, 4, 8, 8), shift_factor=0.0609, scaling_factor=1.5)
    return Lumina2Pipeline(transformer=part, scheduler=_euler(shift=6.0), vae=vae, text_encoder=encoder, tokenizer=words)


def pixart(seed: int = 0):
    """PixArt-Sigma, whose transformer says a variance beside the noise."""
    from diffusers import DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    encoder, words = _t5(16, seed)
    torch.manual_seed(seed)
    part = PixArtTransformer2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=16, in_channels=4,
        cross_attention_dim=24, out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    ).eval()  # fmt: skip
    scheduler = DDIMScheduler(clip_sample=False)
    return PixArtSigmaPipeline(transformer=part, scheduler=scheduler, vae=_vae(seed), text_encoder=encoder, tokenizer=words)


def wan(seed: int = 0):
    """Wan 2.1, with the solver that it is shipped with."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    encoder, words = _t5(16, seed, "UMT5")
    torch.manual_seed(seed)
    part = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=64, ffn_dim=32,
        num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    ).eval()  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True], latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.0, 2.0],
    ).eval()  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(transformer=part, scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=words)


PIPELINES = {
    "sd3": sd3, "flux": flux, "z_image": z_image, "qwen_image": qwen_image, "flux2": flux2, "sana": sana, "lumina2": lumina2, "pixart": pixart,
    "wan": wan,
}  # fmt: skip
