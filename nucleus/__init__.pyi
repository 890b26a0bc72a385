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
from . import storage as storage
from . import tracking as tracking
from . import training as training

__version__: str
