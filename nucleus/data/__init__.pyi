from .cache import ShardCache as ShardCache, default_cache_dir as default_cache_dir
from .dataset import DATASET_FORMAT as DATASET_FORMAT, Dataset as Dataset, DatasetLocation as DatasetLocation, DatasetManifest as DatasetManifest, LeftOut as LeftOut, SPLITS as SPLITS, Sample as Sample, Shard as Shard, content_version as content_version, list_datasets as list_datasets, list_versions as list_versions, locate_dataset as locate_dataset, open_dataset as open_dataset, read_manifest as read_manifest, verify_dataset as verify_dataset
from .images import IMAGE_SUFFIXES as IMAGE_SUFFIXES, Kind as Kind, Stretch as Stretch, colours_of as colours_of, decode_image as decode_image, decode_raw as decode_raw, encode_png as encode_png, kind_of as kind_of, labels_from_binary as labels_from_binary, labels_from_label_image as labels_from_label_image, labels_from_masks as labels_from_masks, rgb8 as rgb8, stretch_of as stretch_of, to_rgb8 as to_rgb8
from .importing import Imported as Imported, SplitOptions as SplitOptions, import_dataset as import_dataset
from .layouts import Annotated as Annotated, Layout as Layout, MaskForm as MaskForm, Source as Source, find_images as find_images, open_source as open_source
from .normalization import histogram_of as histogram_of, normalization_table as normalization_table, normalize as normalize, normalize_tensor as normalize_tensor
from .pipeline import Feed as Feed, training_batches as training_batches, training_sample as training_sample
from .reader import LabelledImage as LabelledImage, OpenShard as OpenShard, SplitReader as SplitReader, cached_split as cached_split, example_positions as example_positions, example_records as example_records, images_of_split as images_of_split, images_of_worker as images_of_worker, split_reader as split_reader
from .sampling import EpochPlan as EpochPlan, epoch_plan as epoch_plan, shard_count as shard_count, stored_order as stored_order
from .shards import ShardFile as ShardFile, decode_record as decode_record, encode_record as encode_record, write_shard as write_shard
from .splits import Fingerprint as Fingerprint, fingerprint as fingerprint, group_images as group_images, split_images as split_images
from .synthetic import generated_image as generated_image, write_generated as write_generated
from .tiff import TIFF_SUFFIXES as TIFF_SUFFIXES, TiffFacts as TiffFacts, tiff_facts as tiff_facts
