"""Small random vision-language models, and prompts with real images for them."""

import numpy as np
import torch
from PIL import Image
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

START, END, IMAGE, VIDEO = 90, 91, 92, 93
_TEXT = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_IDS = dict(vision_start_token_id=START, vision_end_token_id=END, image_token_id=IMAGE, video_token_id=VIDEO)
_EYES = {
    "qwen2_vl": dict(depth=2, embed_dim=32, hidden_size=48, num_heads=2, mlp_ratio=2),
    "qwen2_5_vl": dict(
        depth=2, hidden_size=32, out_hidden_size=48, num_heads=2, intermediate_size=64, fullatt_block_indexes=[1]
    ),
}  # fmt: skip
_CLASSES = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
}


def build_vision(name, seed=0, **more):
    """Random model whose weights are large enough for attention, and the image, to matter."""
    torch.manual_seed(seed)
    config, cls = _CLASSES[name]
    model = cls(config(text_config=_TEXT | more, vision_config=_EYES[name], **_IDS)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    model.generation_config.eos_token_id = None
    return model


def picture(width, height, seed=0):
    """A real image: coloured shapes on a gradient."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([255 * x / width, 255 * y / height, np.full_like(x, rng.integers(256))], -1)
    for _ in range(4):
        centre, radius = rng.integers(0, [height, width]), rng.integers(8, 24)
        pixels[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def inputs_with(*images, text=7, seed=0):
    """Prompt of one row: words, then each image between its marks, then words."""
    processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 24)
    seen = processor(images=list(images), return_tensors="pt")
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 89, (2 * text,), generator=generator).tolist()
    ids = words[:text]
    for grid in seen["image_grid_thw"]:
        ids += [START, *[IMAGE] * (int(grid.prod()) // 4), END]
    ids = torch.tensor([ids + words[text:]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": seen["pixel_values"],
        "image_grid_thw": seen["image_grid_thw"],
    }
