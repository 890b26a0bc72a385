from . import config as config
from . import data as data
from . import doctor as doctor
from . import metrics as metrics
from . import model as model
from . import pictures as pictures
from . import predict as predict
from . import registry as registry
from . import report as report
from . import runs as runs
from . import serve as serve
from . import storage as storage
from . import tracking as tracking
from . import training as training
from .api import Dataset as Dataset
from .api import Evaluation as Evaluation
from .api import Model as Model
from .api import ModelManifest as ModelManifest
from .api import Recipe as Recipe
from .api import Segmentation as Segmentation
from .api import evaluate as evaluate
from .api import import_dataset as import_dataset
from .api import load as load
from .api import open_dataset as open_dataset
from .api import read_recipe as read_recipe
from .api import train as train

__version__: str
