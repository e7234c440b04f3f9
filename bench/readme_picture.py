"""Make the README's picture: source, instructions and results of the bundled checkpoint.

python bench/readme_picture.py [--model DIR] [-o docs/pictures/example.png]
"""

from pathlib import Path

import click
from PIL import Image, ImageDraw, ImageFont

from step1x.engine import Engine

INSTRUCTIONS = ("make it black and white", "add a blue square at the top left")
SIZE = (340, 228)


@click.command()
@click.option("--photo", type=click.Path(path_type=Path), default=Path("docs/pictures/coffee.jpg"), show_default=True)
@click.option("--model", type=click.Path(path_type=Path), help="Model folder.  [default: bundled]")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("docs/pictures/example.png"))
def main(photo: Path, model: Path | None, output: Path) -> None:
    engine = Engine.load(model)
    source = Image.open(photo).convert("RGB")
    shown = [(source, "source")]
    shown += [(engine.edit(source, words, seed=0).image, f'"{words}"') for words in INSTRUCTIONS]
    page = Image.new("RGB", (len(shown) * (SIZE[0] + 8) + 8, SIZE[1] + 36), "white")
    draw = ImageDraw.Draw(page)
    for index, (image, title) in enumerate(shown):
        x = 8 + index * (SIZE[0] + 8)
        page.paste(image.resize(SIZE, Image.Resampling.LANCZOS), (x, 8))
        draw.text((x + 2, SIZE[1] + 12), title, fill="black", font=ImageFont.load_default(17))
    page.save(output)


if __name__ == "__main__":
    main()
