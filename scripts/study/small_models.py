"""Small models of other kinds than the study's, with their data: characters of tiny_shakespeare, images of Fashion-MNIST and CIFAR-10."""

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import transformers as hf
from datasets import Dataset, load_dataset
from PIL import Image
from torch import Tensor, nn

from scripts.bench.spectral import small_vit

LENGTH: Final = 64
"""Characters in a row."""
TEXTS: Final = ("gpt2", "llama-tied", "bert", "t5", "lstm")


class Task(NamedTuple):
    """A model with its data.

    Attributes:
        model: With random weights.
        loss: Of a batch, drawn with a generator.
        evaluate: On held-out data, always the same.
    """

    model: nn.Module
    loss: Callable[[torch.Generator], Tensor]
    evaluate: Callable[[], Tensor]


def _rows(data: Path | None, folder: str, hub: str) -> Dataset:
    """The training rows of a data set."""
    if data is None:
        return load_dataset(hub, split="train")
    return load_dataset("parquet", data_files=str(data / folder / "train.parquet"), split="train")


@functools.cache
def _characters(data: Path | None) -> Tensor:
    """tiny_shakespeare, a number below 128 for each byte."""
    text = "".join(_rows(data, "tiny_shakespeare", "karpathy/tiny_shakespeare")["text"])
    return torch.tensor(np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) % 128)


@functools.cache
def _images(data: Path | None, folder: str, hub: str, count: int) -> tuple[Tensor, Tensor]:
    """The first images and their labels, `[count, channels, height, width]`."""
    columns = _rows(data, folder, hub).select(range(count)).with_format("numpy")
    image, label = ("image" if "image" in columns.column_names else "img"), "label"
    pixels = [_pixels(value) for value in columns[image]]
    stack = torch.tensor(np.stack(pixels).astype(np.float32) / 255)
    stack = stack[:, None] if stack.ndim == 3 else stack.permute(0, 3, 1, 2)
    return ((stack - 0.5) / 0.25).contiguous(), torch.tensor(np.asarray(columns[label]))


def _pixels(value: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(value["bytes"])) if isinstance(value, dict) else value)


class _Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.recurrent = nn.Embedding(128, 64), nn.LSTM(64, 128, 2, batch_first=True)
        self.head = nn.Linear(128, 128)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.recurrent(self.embedding(ids))[0])
        return logits


def task_of(kind: str, data: Path | None) -> Task:
    """A model with random weights and its data, from the hub where `data` is None."""
    return (_text_task if kind in TEXTS else _image_task)(kind, data)


def _text_task(kind: str, data: Path | None) -> Task:
    """A language model on characters: the next one, masked ones, or the second half from the first."""
    text = _characters(data)
    cut = int(0.9 * len(text))
    train, held_out = text[:cut], text[cut:]
    if kind == "llama-tied":
        train = train[:30_000]
    small: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    model: Any
    if kind == "gpt2":
        gpt2: dict[str, Any] = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": LENGTH, "resid_pdrop": 0.1}
        model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=128, bos_token_id=0, eos_token_id=0, **gpt2))
    elif kind == "llama-tied":
        llama = hf.LlamaConfig(vocab_size=128, intermediate_size=192, tie_word_embeddings=True, **small)
        model = hf.LlamaForCausalLM(llama)
    elif kind == "bert":
        bert = hf.BertConfig(vocab_size=129, intermediate_size=128, max_position_embeddings=LENGTH, **small)
        model = hf.BertForMaskedLM(bert)
    elif kind == "t5":
        ids: dict[str, Any] = {"decoder_start_token_id": 0, "pad_token_id": 128}
        t5 = hf.T5Config(vocab_size=129, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, **ids)
        model = hf.T5ForConditionalGeneration(t5)
    else:
        model = _Lstm()

    def batch(source: Tensor, count: int, generator: torch.Generator) -> Tensor:
        starts = torch.randint(0, len(source) - LENGTH - 1, (count,), generator=generator)
        return torch.stack([source[at : at + LENGTH] for at in starts])

    def loss(ids: Tensor, generator: torch.Generator) -> Tensor:
        if kind == "lstm":
            return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        asked = {"input_ids": ids, "labels": ids}
        if kind == "bert":
            masked = torch.rand(ids.shape, generator=generator) < 0.15
            asked = {"input_ids": torch.where(masked, 128, ids), "labels": torch.where(masked, ids, -100)}
        elif kind == "t5":
            asked = {"input_ids": ids[:, : LENGTH // 2], "labels": ids[:, LENGTH // 2 :].contiguous()}
        found: Tensor = model(**asked).loss
        return found

    def evaluate() -> Tensor:
        generator = torch.Generator().manual_seed(7)
        return torch.stack([loss(batch(held_out, 64, generator), generator) for _ in range(3)]).mean()

    return Task(model, lambda generator: loss(batch(train, 16, generator), generator), evaluate)


def _block(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _block(width, width), _block(width, width)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.second(self.first(x))
        return added


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.deeper = nn.Conv2d(3, 24, 3, 2, 1), nn.Conv2d(24, 48, 3, 2, 1)
        self.middle, self.up = nn.Conv2d(48, 48, 3, 1, 1), nn.ConvTranspose2d(48, 24, 4, 2, 1)
        self.higher, self.out = nn.ConvTranspose2d(48, 16, 4, 2, 1), nn.Conv2d(19, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        act = nn.functional.silu
        down = act(self.down(x))
        up = act(self.up(act(self.middle(act(self.deeper(down))))))
        noise: Tensor = self.out(torch.cat([act(self.higher(torch.cat([up, down], 1))), x], 1))
        return noise


class _Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit = small_vit()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.vit(pixel_values=x).logits
        return logits


def _image_task(kind: str, data: Path | None) -> Task:
    """Classes of images, or for the U-Net the noise in them."""
    grey = kind in ("mlp", "vit-small")
    count = 2_000 if kind.endswith("-small") else 10_000
    source = ("fashion_mnist", "zalando-datasets/fashion_mnist") if grey else ("cifar10", "uoft-cs/cifar10")
    x, y = _images(data, *source, count + 1_000)
    model: nn.Module
    if kind.startswith("resnet"):
        body = (_block(3, 16, 2), _Residual(16), _block(16, 32, 2), _Residual(32))
        model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    elif kind == "mlp":
        layers = (nn.Linear(784, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10))
        model = nn.Sequential(nn.Flatten(), *layers)
    else:
        model = _UNet() if kind == "unet" else _Vit()

    def loss(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        if kind != "unet":
            return nn.functional.cross_entropy(model(x), y)
        noise = torch.randn(x.shape, generator=generator)
        share = torch.rand(len(x), 1, 1, 1, generator=generator)
        return nn.functional.mse_loss(model(x * (1 - share) + noise * share), noise - x)

    def of_batch(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(0, count, (32,), generator=generator)
        return loss(x[chosen], y[chosen], generator)

    return Task(model, of_batch, lambda: loss(x[count:], y[count:], torch.Generator().manual_seed(7)))
