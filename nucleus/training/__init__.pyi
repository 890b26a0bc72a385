from .callbacks import Augmented as Augmented, Demand as Demand, Finished as Finished, Reporter as Reporter, Watch as Watch, augmented_examples as augmented_examples, example_images as example_images
from .checkpoint import BEST_WEIGHTS as BEST_WEIGHTS, History as History, Progress as Progress, load_checkpoint as load_checkpoint, save_checkpoint as save_checkpoint
from .distributed import NO_SCORES as NO_SCORES, ScoreFunction as ScoreFunction, StepResult as StepResult, TrainingStep as TrainingStep, Workers as Workers, mask_scores as mask_scores
from .optimizer import ParameterGroup as ParameterGroup, active_groups as active_groups, averaged as averaged, parameter_groups as parameter_groups
from .trainer import TrainingInput as TrainingInput, TrainingRun as TrainingRun, train as train
from .tuning import tune_instances as tune_instances
from .validation import EXTREMES as EXTREMES, Extreme as Extreme, Extremes as Extremes, PredictedImage as PredictedImage, predict_images as predict_images, score_image as score_image, score_images as score_images
