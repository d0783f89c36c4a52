"""Stage one (paper A, algorithm 1): both branches of guidance folded into one network that takes w."""

from fewstep.distill import GuidanceDistillation
from fewstep.lab.context import StageContext
from fewstep.lab.networks import build_denoiser, guided_student, own_network, with_dropout
from fewstep.lab.stages.fit import compile_networks, fit, load_model, save_model, seed_everything
from fewstep.lab.validate_teachers import TEACHERS
from fewstep.models import NetworkDenoiser
from fewstep.schedules import Trained


def run(ctx: StageContext) -> None:
    """Distil guidance; writes `model/`, the averaged weights of the w-conditioned student."""
    stage, seed = ctx.stage, seed_everything(ctx)
    (folder,) = ctx.inputs_of_kind(*TEACHERS).values()
    teacher = load_model(ctx, folder)
    low, high = stage.w_range
    student = _student(ctx, teacher, (low, high))
    student.trained = Trained("guided", w_range=(low, high))
    compile_networks(ctx, teacher, student)
    method = GuidanceDistillation(teacher, student, teacher.null_cond, w_range=(low, high), weight=stage.weight)
    fit(ctx, method, seed=seed)
    save_model(ctx, student)


def _student(ctx: StageContext, teacher: NetworkDenoiser, w_range: tuple[float, float]) -> NetworkDenoiser:
    network = own_network(ctx.config, ctx.stage.student.network)
    own = None if network is None else build_denoiser(ctx.config, network, teacher.prediction).to(ctx.device)
    student = guided_student(teacher, own, ctx.stage.guidance_form, w_range)
    return with_dropout(student, ctx.stage.dropout).to(ctx.device)
