from .bucket import Bucket as Bucket, StoredObject as StoredObject, body_of as body_of, check_conditional_writes as check_conditional_writes, watch_uploads as watch_uploads
from .bulk import BulkReader as BulkReader, Refusal as Refusal, UNREACHABLE as UNREACHABLE, obstore_error as obstore_error
from .files import atomic_path as atomic_path, check_sums as check_sums, read_document as read_document, sha256_of as sha256_of, write_atomic as write_atomic, write_sums as write_sums
from .local_server import RunningStore as RunningStore, environment as environment, make_bucket as make_bucket, start as start, status as status, stop as stop
from .retries import DEFAULT_STORAGE_TIMEOUT as DEFAULT_STORAGE_TIMEOUT, ask_briefly as ask_briefly, ask_patiently as ask_patiently, seconds_of_silence as seconds_of_silence, set_storage_timeout as set_storage_timeout, storage_timeout as storage_timeout
from .s3_errors import endpoint as endpoint, explained as explained
from .uri import S3Uri as S3Uri, bucket_from_environment as bucket_from_environment, parse_uri as parse_uri
