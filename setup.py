"Package metadata from `settings.ini`; the version from `imgclf/__init__.py`."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
lines = lambda s: [o.strip() for o in s.splitlines() if o.strip()]

setup(
    version=re.search(r"__version__\s*=\s*['\"](.+?)['\"]", (here/'imgclf/__init__.py').read_text())[1],
    description=cfg['description'], author=cfg['author'], license=cfg['license'], keywords=cfg['keywords'].split(),
    long_description=(here/'README.md').read_text(encoding='utf-8') if (here/'README.md').exists() else '',
    long_description_content_type='text/markdown',
    install_requires=lines(cfg['requirements']),
    extras_require={name: lines(value) for name, value in ini['extras'].items() if name not in ini.defaults()},
    packages=find_packages(include=['imgclf*']),
    package_data={'imgclf': ['recipes/*.yaml', 'recipes/**/*.yaml', 'py.typed']},
    entry_points={'console_scripts': ['imgclf=imgclf.cli:main'], 'nbdev': ['imgclf=imgclf._modidx:d']},
)
