"""The README.md of an exported folder. Its code is the source of ``plain_transformers``, which the tests run."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from megatron_cocoa.config import EmbeddingForm
from megatron_cocoa.export import plain_transformers

_CARD = """\
---
library_name: {library}
pipeline_tag: feature-extraction
tags:
- multimodal-embedding
- {model_type}
---

# Multimodal embedding model

A {model_type} whose attention is {attention} (`text_config.is_causal` is `{is_causal}` in `config.json`), trained by
the method of CoCoA (arXiv 2603.01471). The embedding of a text, a picture or both is the final hidden state, after the
last norm, at the bridge token `{bridge_token}` that follows the input, divided by its length: {hidden_size} numbers.

There is no chat template between the input and the bridge. The input is
`{placeholder}` for a picture, then the text as it stands (an instruction is put in
front of the text), then `{bridge_token}`.

## With transformers alone

Checked with transformers {transformers}.

```python
{code}

embedder = PlainEmbedder("."{arguments})
print(embedder.embed("a red house"))
```

{pictures} Lay transparent ones on white first.

## With megatron_cocoa

```python
from megatron_cocoa import CocoaEmbedder

vectors = CocoaEmbedder.from_pretrained(".").encode([{{"text": "a red house"}}, {{"image": "house.png"}}])
```
{sentence_transformers}{golden}"""

_NATIVE = "Pictures keep their shape within the image processor's pixel limits."
_SQUARE = (
    "Pictures are resized to {size} x {size} pixels, whatever their shape. The image processor of transformers cannot "
    "be told so (it keeps a picture's shape under any setting), hence the line in the code above."
)

_GOLDEN = """
## Check an installation

`golden.json` holds inputs and their vectors in fp32. This command compares them with what an installation computes:

```
python -m megatron_cocoa.export.check_golden .
```
"""

_SENTENCE_TRANSFORMERS = """
## With sentence-transformers

`chat_template.jinja` in this folder is no chat format: it writes the picture, the text and the bridge, as above.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(".")
vectors = model.encode([{"text": "a red house", "image": "house.png"}])
```

It computes in the dtype of the weights on disk. In fp32, as the code above does:
`SentenceTransformer(".", model_kwargs={"dtype": "float32"})`.

A text that spells a control token, such as `<|im_end|>`, is read as that token here, and as plain characters above.
"""


def model_card(
    *,
    model_type: str,
    hidden_size: int,
    bridge_token: str,
    default_bridge: bool,
    sentence_transformers: bool,
    image_size: int | None = None,
    golden: bool = True,
    form: EmbeddingForm = EmbeddingForm(),
) -> str:
    """Markdown for ``README.md``.

    Args:
        model_type: of ``config.json``.
        hidden_size: length of a vector.
        bridge_token: token that carries the embedding.
        default_bridge: whether the code may leave it out.
        sentence_transformers: whether the folder has modules for that library.
        image_size: side in pixels of the square that pictures are resized to; None where they keep their shape.
        golden: whether the folder has a ``golden.json``.
        form: in which the model embeds.
    """
    arguments = "" if default_bridge else f', bridge_token="{bridge_token}"'
    arguments += "" if image_size is None else f", image_size={image_size}"
    is_bare = form.image_placeholder == "bare"
    arguments += ", bare_pictures=True" if is_bare else ""
    return _CARD.format(
        attention=form.attention,
        is_causal="true" if form.attention == "causal" else "false",
        placeholder="<|image_pad|>.." if is_bare else "<|vision_start|><|image_pad|>..<|vision_end|>",
        library="sentence-transformers" if sentence_transformers else "transformers",
        model_type=model_type,
        hidden_size=hidden_size,
        bridge_token=bridge_token,
        transformers=version("transformers"),
        code=Path(plain_transformers.__file__).read_text(encoding="utf-8").strip(),
        arguments=arguments,
        pictures=_NATIVE if image_size is None else _SQUARE.format(size=image_size),
        golden=_GOLDEN if golden else "",
        sentence_transformers=_SENTENCE_TRANSFORMERS if sentence_transformers else "",
    )
