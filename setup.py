"""Package metadata comes from settings.ini; this file only translates it for setuptools."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
meta = config["DEFAULT"]
pythons = [f"3.{minor}" for minor in range(int(meta["min_python"].split(".")[1]), int(meta["max_python"].split(".")[1]) + 1)]
status = ("Planning", "Pre-Alpha", "Alpha", "Beta", "Production/Stable", "Mature", "Inactive")

setup(
    name=meta["lib_name"],
    version=meta["version"],
    description=meta["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=meta["author"],
    author_email=meta["author_email"],
    url=meta["git_url"],
    project_urls={
        "Documentation": meta["doc_host"] + meta["doc_baseurl"],
        "Source": meta["git_url"],
        "Issues": meta["git_url"] + "/issues",
        "Changelog": f"{meta['git_url']}/blob/{meta['branch']}/CHANGELOG.md",
    },
    license="Apache-2.0",  # what `apache2` of nbdev is called elsewhere
    keywords=meta["keywords"].split(),
    classifiers=[
        f"Development Status :: {meta['status']} - {status[int(meta['status']) - 1]}",
        f"Intended Audience :: {meta['audience']}",
        f"Natural Language :: {meta['language']}",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: {version}" for version in pythons),
        "Topic :: Scientific/Engineering :: Atmospheric Science",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["pnpda_nb", "pnpda_nb.*"]),
    package_data={"pnpda_nb": ["py.typed", "results.json"]},
    python_requires=f">={meta['min_python']}",
    install_requires=meta["requirements"].split(),
    extras_require={name: meta[f"{name}_requirements"].split() for name in ("dev", "dapper", "distributed", "torchcfm", "zarr")},
    entry_points={
        "console_scripts": meta["console_scripts"].split(),
        "nbdev": [f"{meta['lib_name']}={meta['lib_path']}._modidx:d"],  # lets `Name` in prose link to its entry
    },
    zip_safe=False,
)
