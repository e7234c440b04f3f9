"""What must be known of a model to build and to plan it: sizes of the networks, and the preset with its overrides."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from step1x.engine import released, sizes
from step1x.engine.checkpoint import read_json
from step1x.engine.connector import ConnectorConfig
from step1x.engine.dit import DiTConfig
from step1x.engine.errors import InputError
from step1x.engine.folder import ModelFolder, locate
from step1x.engine.hollow import ModelSizes
from step1x.engine.qwen import load_tokenizer, parse_config
from step1x.engine.tokens import HEADER
from step1x.engine.vae import VAEConfig
from step1x.engine.variants import DEFAULTS, Variant, variant

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLConfig

CONFIG = "config.json"  # of the text model, and of an engine


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Of a model's folder, an engine's or a released model."""

    preset: str
    overrides: Mapping[str, Any]
    dit: DiTConfig
    vae: VAEConfig
    text: Mapping[str, Any]  # config.json of the text model

    @classmethod
    def read(cls, path: Path) -> Self:
        """From a file with `as_json`."""
        values = read_json(path)
        dit, vae = dict(values["dit"]), dict(values["vae"])
        dit |= {"connector": ConnectorConfig(**dit["connector"]), "rope_axes": tuple(dit["rope_axes"])}
        vae["channels"] = tuple(vae["channels"])
        return cls(**{**values, "dit": DiTConfig(**dit), "vae": VAEConfig(**vae)})

    @classmethod
    def of(cls, folder: ModelFolder) -> Self:
        """Of a located model, from the headers of its files. Raises InputError for what is missing or wrong."""
        path = folder.needed_text()[0] / CONFIG
        text = read_json(path)
        parse_config(text, path)
        return cls(
            preset=folder.variant().name,
            overrides=folder.settings.get("overrides", {}),
            dit=sizes.dit_config(folder.dit, folder.dit_configs),
            vae=sizes.vae_config(folder.needed_vae(), folder.vae_configs),
            text=text,
        )

    @classmethod
    def released(cls, version: str, processor: Path) -> Self:
        """Of a released model, with the tokenizer in `processor`."""
        from transformers import Qwen2_5_VLConfig

        row = DEFAULTS[version]
        backend = load_tokenizer(processor).backend_tokenizer
        template = backend.encode(HEADER + row.prefix, add_special_tokens=False).ids
        return cls(
            preset=row.name,
            overrides={"template_tokens": len(template) - 1},  # up to its last colon (model.md §1.3)
            dit=released.dit_config(version),
            vae=released.VAE,
            text=Qwen2_5_VLConfig(**released.QWEN).to_dict(),
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def variant(self, name: str | None = None) -> Variant:
        """The preset to run with. Raises InputError if `name` is unknown or of another version than the weights."""
        own = variant(self.preset)
        try:
            row = variant(name or self.preset)
        except ValueError as error:
            raise InputError(str(error)) from None
        if row.version != own.version:
            raise InputError(f"preset {row.name} is for {row.version}, the engine's weights are {own.version}")
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in self.overrides.items()}
        return row.override(values)

    def qwen(self, path: Path) -> "Qwen2_5_VLConfig":
        """The text model's config, which was read from `path`."""
        return parse_config(dict(self.text), path)

    def limited(self, blocks: int | None) -> Self:
        """With no more than so many double and single blocks."""
        if blocks is None:
            return self
        depth, single = min(self.dit.depth, blocks), min(self.dit.depth_single, blocks)
        return replace(self, dit=replace(self.dit, depth=depth, depth_single=single))

    def sizes(self, name: str) -> ModelSizes:
        """What the planner must know."""
        qwen = self.qwen(Path(CONFIG))  # transformers wrote it nested or, older, flat
        text = {part: getattr(qwen, part).to_dict() for part in ("text_config", "vision_config")}
        return ModelSizes(name=name, variant=self.variant(), dit=self.dit, vae=self.vae, qwen=json.dumps(text))


def model_sizes(model: str | Path | None) -> ModelSizes:
    """Sizes of a model from the headers of its files (see `folder.locate`), or of a released one: "v1.1", by heart.

    Raises InputError when the model is not there, lacks a part or has keys or shapes that are not right.
    """
    if model in released.VERSIONS:
        version, text = str(model), json.dumps(released.QWEN)
        config = released.dit_config(version)
        return ModelSizes(name=version, variant=variant(version), dit=config, vae=released.VAE, qwen=text)
    folder = locate(model)
    return EngineConfig.of(folder).sizes(folder.name)
