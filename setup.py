"""Package metadata comes from settings.ini; this file only translates it for setuptools."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
meta = config["DEFAULT"]

setup(
    name=meta["lib_name"],
    version=meta["version"],
    description=meta["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=meta["author"],
    author_email=meta["author_email"],
    url=meta["git_url"],
    license="Apache-2.0",
    keywords=meta["keywords"].split(),
    packages=find_packages(include=["pnpda_nb", "pnpda_nb.*"]),
    python_requires=f">={meta['min_python']}",
    install_requires=meta["requirements"].split(),
    extras_require={name: meta[f"{name}_requirements"].split() for name in ("dev", "dapper", "distributed", "torchcfm")},
    entry_points={
        "console_scripts": meta["console_scripts"].split(),
        "nbdev": [f"{meta['lib_name']}={meta['lib_path']}._modidx:d"],  # lets `Name` in prose link to its entry
    },
    zip_safe=False,
)
