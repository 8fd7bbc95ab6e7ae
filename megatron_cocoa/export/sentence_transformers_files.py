"""The files that make a Hugging Face folder a sentence-transformers model: modules, pooling, and the input's layout.

sentence-transformers (6.2) lays inputs with pictures out by a template. The one written here is no chat format: it
writes the picture, the text and the bridge token, as in training. A prompt goes in front of the text.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

WRITTEN_FOR = "6.2.0"

_BASE = "sentence_transformers.base.modules"
_OWN = "sentence_transformers.sentence_transformer.modules"
_FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}

_TEMPLATE = (
    "{%- for message in messages if message.content is not string -%}"
    "{%- for part in message.content if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- endfor -%}{%- endfor -%}"
    "{%- for message in messages -%}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}{%- for part in message.content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}{%- endif -%}"
    "{%- endfor -%}BRIDGE"
)


def write_modules(folder: Path, *, hidden_size: int, bridge_token: str) -> None:
    """Add the files to a Hugging Face folder.

    Args:
        folder: complete otherwise.
        hidden_size: length of a vector.
        bridge_token: the last token of every input, whose hidden state is pooled.
    """
    _write(folder / "modules.json", [
        {"idx": 0, "name": "0", "path": "", "type": f"{_BASE}.transformer.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{_OWN}.pooling.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{_BASE}.normalize.Normalize"},
    ])  # fmt: skip
    _write(folder / "sentence_bert_config.json", {
        "transformer_task": "feature-extraction",
        # Texts and pictures are turned into messages for the template, but must be named to be accepted.
        "modality_config": {
            "text": _FORWARD,
            "image": _FORWARD,
            "image+text": _FORWARD,
            "message": _FORWARD | {"format": "structured"},
        },
        "module_output_name": "token_embeddings",
    })  # fmt: skip
    _write(folder / "config_sentence_transformers.json", {
        "__version__": {"sentence_transformers": WRITTEN_FOR, "transformers": version("transformers")},
        "model_type": "SentenceTransformer",
        "prompts": {"query": "", "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    })  # fmt: skip
    (folder / "1_Pooling").mkdir()
    _write(folder / "1_Pooling" / "config.json", {
        "embedding_dimension": hidden_size, "pooling_mode": "lasttoken", "include_prompt": True,
    })  # fmt: skip
    (folder / "2_Normalize").mkdir()
    _write(folder / "2_Normalize" / "config.json", {"module_input_name": "sentence_embedding"})
    (folder / "chat_template.jinja").write_text(_TEMPLATE.replace("BRIDGE", bridge_token), encoding="utf-8")


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
