"""The long texts of docs/adaptation.md, out of Debian's packages: novels by Jane Austen, the anarchist FAQ.

  apt-get download r-cran-janeaustenr anarchism
  for package in *.deb; do dpkg-deb -x $package debian; done
  pip install rdata
  python benchmarks/adaptation/texts.py debian texts

Writes texts/train/*.txt and texts/valid/persuasion.txt, the novel that is held out.
"""

import argparse
import gzip
import warnings
import zlib
from pathlib import Path

import rdata

HELD_OUT = "persuasion"


def novels(folder: Path) -> dict[str, str]:
    """Name -> text, from the package's Rdata.rdb and the index beside it."""
    index = rdata.conversion.convert(rdata.parser.parse_data(gzip.decompress((folder / "Rdata.rdx").read_bytes())))
    database = (folder / "Rdata.rdb").read_bytes()
    found = {}
    for name, (start, length) in index["variables"].items():
        entry = database[start + 4 : start + length]  # after its length when unpacked
        lines = rdata.conversion.convert(rdata.parser.parse_data(zlib.decompress(entry)))
        found[str(name)] = "\n".join(lines)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("debian", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    texts = novels(arguments.debian / "usr/lib/R/site-library/janeaustenr/data")
    for file in sorted((arguments.debian / "usr/share/doc/anarchism/markdown").glob("*.md*")):
        data = file.read_bytes()
        texts[file.name.split(".")[0]] = (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
    for name, text in texts.items():
        file = arguments.output / ("valid" if name == HELD_OUT else "train") / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        print(f"{file}: {len(text) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
