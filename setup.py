"Package the library from the values in settings.ini, which stays the only place where they are written."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(root/"settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
LICENSES = dict(mit="MIT", apache2="Apache-2.0")
STATUS = ["1 - Planning", "2 - Pre-Alpha", "3 - Alpha", "4 - Beta", "5 - Production/Stable"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root/"README.md").read_text(encoding="utf-8") if (root/"README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license=LICENSES[cfg["license"]],
    url=cfg["git_url"],
    project_urls=dict(Documentation=cfg["doc_host"] + cfg["doc_baseurl"]),
    keywords=cfg["keywords"].split(),
    classifiers=[
        f"Development Status :: {STATUS[int(cfg['status']) - 1]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]),
    install_requires=cfg["requirements"].split(),
    extras_require={k: cfg[f"{k}_requirements"].split() for k in ("dev", "studies")},
    entry_points=dict(
        console_scripts=cfg["console_scripts"].split(),
        nbdev=[f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],  # lets nbdev link names in prose to their pages
    ),
)
