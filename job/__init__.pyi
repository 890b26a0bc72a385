from .actor_pool import spread as spread
from .capacity import Capacity as Capacity, check_capacity as check_capacity, check_resources as check_resources, resources_needed as resources_needed, shortage as shortage
from .cluster import address_at_hand as address_at_hand, capacities as capacities, cluster as cluster, connected as connected
from .cluster_check import RayCheck as RayCheck, check_ray as check_ray, query_head as query_head
from .events import Listener as Listener, SilentListener as SilentListener, beside_driver as beside_driver, forwarded as forwarded
from .filesystem import run_storage as run_storage
from .inference import EvaluationPlan as EvaluationPlan, StoredResult as StoredResult, evaluate_spread as evaluate_spread, predict_stored as predict_stored
from .job_api import DEFAULT_ADDRESS as DEFAULT_ADDRESS, Job as Job, STOP_SECONDS as STOP_SECONDS, all_jobs as all_jobs, capacities_of as capacities_of, check_address as check_address, cluster_address as cluster_address, find_job as find_job, follow as follow, job_client as job_client, job_log as job_log, stop_job as stop_job, with_retries as with_retries
from .publishing import Fitted as Fitted, judge as judge, publish_fitted as publish_fitted
from .ray_internals import MultiWorkerConfig as MultiWorkerConfig, our_error as our_error
from .reporting import has_facts as has_facts, report_folder as report_folder, report_published as report_published, report_run as report_run
from .run_callbacks import FINAL_FOLDER as FINAL_FOLDER, RayReporter as RayReporter, RunPictures as RunPictures, network_facts as network_facts, save_model as save_model
from .signals import Demands as Demands, stop_request as stop_request, stops_on_sigterm as stops_on_sigterm
from .submit import DryRun as DryRun, Submission as Submission, dry_run as dry_run, prepare as prepare
from .sweep import Outcome as Outcome, SweepResult as SweepResult, Trial as Trial, sweep as sweep
from .train import RunOptions as RunOptions, fit as fit, plan_run as plan_run, resume as resume, train as train
from .worker import limit_devices as limit_devices, train_worker as train_worker
