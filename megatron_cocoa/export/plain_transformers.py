"""Embeddings with transformers alone. Needs torch, transformers and pillow, nothing else."""

import json

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


class PlainEmbedder:
    def __init__(
        self, folder, bridge_token="<|im_end|>", image_size=None, bare_pictures=False, dtype=torch.float32
    ):
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, use_safetensors=True).eval()
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        # Text is read without control tokens, whatever it spells; some of them are not flagged as special.
        encoder = json.loads(self.tokenizer.backend_tokenizer.to_str())
        encoder |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        self.text_encoder = Tokenizer.from_str(json.dumps(encoder))
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.image_size, self.bare_pictures = image_size, bare_pictures
        names = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", bridge_token)
        self.vision_start, self.image_pad, self.vision_end, self.bridge = self.tokenizer.convert_tokens_to_ids(names)

    @torch.no_grad()
    def embed(self, text="", image=None):
        """Unit vector (hidden,) of a text, of an RGB picture, or of a picture followed by a text."""
        ids, vision = [], {}
        if image is not None:
            image = image.convert("RGB")
            if self.image_size is not None:
                image = image.resize((self.image_size, self.image_size), resample=self.processor.resample)
            vision = dict(self.processor(images=[image], do_resize=self.image_size is None, return_tensors="pt"))
            units = int(vision["image_grid_thw"].prod()) // self.processor.merge_size**2
            vision["pixel_values"] = vision["pixel_values"].to(self.model.dtype)
            pads = [self.image_pad] * units
            ids += pads if self.bare_pictures else [self.vision_start, *pads, self.vision_end]
        if text:
            ids += self.text_encoder.encode(text, add_special_tokens=False).ids
        input_ids = torch.tensor([[*ids, self.bridge]])
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            **vision,
        }
        if not self.bare_pictures:
            # Without them transformers counts the positions of a picture like those of text.
            inputs["mm_token_type_ids"] = (input_ids == self.image_pad).int()
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        hidden = self.model.model(**inputs, use_cache=False).last_hidden_state
        return torch.nn.functional.normalize(hidden[0, -1].float(), dim=0)
