"""Public names and signatures: argument names, order, defaults and keyword-only ones are a promise."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

import kdfast

# What callers may rely on. More keyword arguments may follow; these stay as they are.
SIGNATURES = {
    "gram_products": "x, y, *, centered=True",
    "linear_cka": "student, teacher, *, centered=True, row_norm='none', debiased=False",
    "CKALoss": "*, centered=True, row_norm='none', debiased=False, weight=1.0",
    "LogitCKALoss": "*, intra_weight=1.0, inter_weight=1.0, centered=True, row_norm='none', temperature=None",
    "RCKALoss": "*, feature_weight=1.0, logit_weight=15.0, centered=True, row_norm='none'",
    "RCKALoss.forward": "self, student_features, teacher_features, student_logits, teacher_logits",
    "GramMMDLoss": "*, kind='gram', weight=1.0",
    "PCKALoss": "*, patch_size=16, average='channel', intra_weight=1.0, inter_weight=0.0, centered=True, "
    "row_norm='none', resize='bilinear', weight=1.0",
    "PatchLoss": "base, *, patch_size=16, resize='bilinear', temperature=4.0, weight=1.0",
    "MimicLoss": "student_channels, teacher_channels, *, weight=1.0",
    "attention_masks": "student, teacher, *, temperature, mode='mean_of_softmax'",
    "AttentionGuidedLoss": "channels=None, *, temperature=0.5, transfer_weight=1.0, masked_weight=1.0, "
    "mask='mean_of_softmax', channel_mask=True, pooling='abs', adapt=True, detach_mask=True",
    "dot_product_affinity": "theta, phi, g",
    "softmax_affinity": "theta, phi, g, *, scale=None",
    "concatenation_affinity": "a, b, g",
    "criss_cross_attention": "query, key, value",
    "NonLocalBlock": "in_channels, inter_channels=None, *, kind='dot_product', key_stride=1, residual=True, zero_init=True",
    "NonLocalLoss": "channels, *, kind='dot_product', key_stride=None, adapt=True, weight=1.0",
    "StructuredKDLoss": "channels, *, preset='two_stage', kind='dot_product'",
    "ClassMeans": "num_classes, dim",
    "ClassMeans.update": "self, features, labels",
    "DirectionNormLoss": "class_means, *, reduction='mean', ignore_index=-100, weight=1.0",
    "DirectionNormLoss.forward": "self, student, teacher, labels",
    "direction_norm_loss": "student, teacher, class_means, labels",
    "DirectionLoss": "class_means, *, kind='cosine', temperature=1.0",
    "NormLoss": "kind='l2', step=1.0",
    "EmbeddingProjector": "in_dim, out_dim, dropout=0.5",
    "KDLoss": "temperature=4.0",
    "DKDLoss": "alpha=1.0, beta=8.0, temperature=4.0",
    "NKDLoss": "gamma=1.5, temperature=1.0",
    "DISTLoss": "beta=1.0, gamma=1.0, temperature=1.0",
    "sokd.FeatureAugmentation.search_loss": "self, student, teacher",
    "sokd.SoKDLoss": "base='fitnet'",
    "compat.mmrazor.CenterKernelAlignmentRKD": "ce_weight=1.0, intra_weight=15, inter_weight=None, combined_KD=False, "
    "temperature=None, with_l2_norm=False",
    "compat.mmrazor.CenterKernelAlignmentSeg": "ce_weight=1.0, intra_weight=15, inter_weight=None, combined_KD=False, "
    "temperature=None, with_l2_norm=True, soften=False",
    "compat.mmrazor.CenterKernelAlignmentSeg.forward": "self, student_logits, teacher_logits",
    "compat.mmrazor.DISTLoss": "inter_loss_weight=1.0, intra_loss_weight=1.0, tau=1.0, loss_weight=1.0, teacher_detach=True",
    "compat.mmrazor.DISTLoss.forward": "self, logits_S, logits_T",
    "compat.mmrazor.FBKDLoss": "mask_l2_weight=7e-05, channel_weight=0.004, spatial_weight=0.004, "
    "nonloacl_weight=7e-05, loss_weight=1.0",
    "compat.mmrazor.FBKDLoss.forward": "self, s_input, t_input",
    "compat.mmrazor.FBKDStudentConnector": "in_channels, reduction=2, conv_cfg={'type': 'Conv2d'}, norm_cfg={'type': 'BN'}, "
    "mode='dot_product', sub_sample=False, maxpool_stride=2, zeros_init=True, spatial_T=0.5, channel_T=0.5, init_cfg=None",
    "compat.dist.DIST": "beta=1.0, gamma=1.0",
    "compat.dist.DIST.forward": "self, z_s, z_t",
    "compat.nd.DirectNormLoss": "num_class=100, nd_loss_factor=1.0",
    "compat.nd.DirectNormLoss.forward": "self, s_emb, t_emb, T_EMB, labels",
    "compat.nd.KDLoss": "kl_loss_factor=1.0, T=4.0",
    "compat.nd.KDLoss.forward": "self, s_out, t_out",
    "compat.nd.DKDLoss": "alpha=1.0, beta=1.0, T=4.0",
    "compat.nd.DKDLoss.forward": "self, s_logits, t_logits, labels",
    "compat.mdistiller.kd_loss": "logits_student, logits_teacher, temperature",
    "compat.mdistiller.dkd_loss": "logits_student, logits_teacher, target, alpha, beta, temperature",
    "compat.mdistiller.at_loss": "g_s, g_t, p",
    "compat.mdistiller.hcl_loss": "fstudent, fteacher",
    "compat.mdistiller.sp_loss": "g_s, g_t",
    "compat.ccnet.CrissCrossAttention": "in_dim",
    "compat.ccnet.RCCAModule.forward": "self, x, recurrence=1",
    "compat.mmcv.NonLocal2d": "in_channels, sub_sample=False, conv_cfg={'type': 'Conv2d'}, reduction=2, use_scale=True, "
    "norm_cfg=None, mode='embedded_gaussian'",
}


def arguments(function) -> list[tuple]:
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in found]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    found = kdfast
    for part in name.split("."):
        found = getattr(found, part)
    scope: dict = {}
    exec(f"def promised({SIGNATURES[name]}): ...", scope)
    promised, given = arguments(scope["promised"]), arguments(found)
    plain = inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert [p for p in given if p[1] == plain][: len(promised)] == [p for p in promised if p[1] == plain]
    assert all(p in given for p in promised)


def test_modules_are_attributes():
    """As the documentation writes them: ``kdfast.recipes.plus_plus``, ``kdfast.compat.nd.KDLoss`` after ``import kdfast``."""
    code = (
        "import kdfast; kdfast.recipes.plus_plus; kdfast.compat.nd.KDLoss; print(sorted(dir(kdfast.compat)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(name in shown for name in ("ccnet", "dist", "mdistiller", "mmcv", "mmrazor", "nd"))
    with pytest.raises(AttributeError, match="no attribute 'recipe'"):
        _ = kdfast.recipe


@pytest.mark.parametrize(
    "module", ["", ".sokd", ".recipes", *(f".compat.{name}" for name in kdfast.compat.__all__), ".compat"]
)
def test_star_imports_bring_what_is_public(module):
    found = importlib.import_module(f"kdfast{module}")
    scope: dict = {}
    exec(f"from kdfast{module} import *", scope)
    assert set(found.__all__) == set(scope) - {"__builtins__"}
    assert set(found.__all__) <= set(dir(found))
