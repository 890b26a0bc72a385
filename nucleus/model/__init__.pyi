from .architecture import CHANNELS as CHANNELS, InstanceSettings as InstanceSettings, MODEL_FORMAT as MODEL_FORMAT, ModelConfig as ModelConfig, config_of_recipe as config_of_recipe, read_model_config as read_model_config
from .export import EXPORT_FORMATS as EXPORT_FORMATS, ExportFormat as ExportFormat, export_model as export_model
from .heads import Maps as Maps, activations as activations, logits_of as logits_of, maps_of as maps_of, mask_of_logits as mask_of_logits
from .instances import kept_labels as kept_labels, label_nuclei as label_nuclei, nucleus_mask as nucleus_mask
from .losses import distance_targets as distance_targets, image_losses as image_losses, pixel_classes as pixel_classes
from .tiling import Axis as Axis, Picture as Picture, Region as Region, TiledNetwork as TiledNetwork, axis_tiles as axis_tiles, reflect_indices as reflect_indices
from .unet import build_unet as build_unet, calibrate_encoder as calibrate_encoder, decoder_variables as decoder_variables, encoder_of as encoder_of, encoder_variables as encoder_variables
from .weight_files import CONFIG_FILE as CONFIG_FILE, WEIGHTS_FILE as WEIGHTS_FILE, load_arrays as load_arrays, load_encoder_weights as load_encoder_weights, load_model as load_model, load_weights as load_weights, save_arrays as save_arrays
