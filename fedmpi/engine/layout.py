"""How the parameters that a client trains lie in memory."""

from __future__ import annotations

from torch import Tensor, nn

from fedmpi.spec import Spec

_SMALL = (
    1 << 20
)  # numbers in all kernels; larger models are up to 15 % slower so (VGG-19), smaller ones faster


class Layout:
    """A small model's convolutions with their channels last, everything else as :class:`Spec` has it.

    With few channels and images, torch's convolutions and poolings on a CPU are 1.1 to 1.6 times as fast so, if the
    *weights* lie so. Whether they do is counted, not timed: a run always takes the same way.
    """

    def __init__(self, model: nn.Module, spec: Spec) -> None:
        self._parameters, self.spec = dict(model.named_parameters()), spec
        kinds = (nn.Conv2d, nn.ConvTranspose2d)
        kernels = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, kinds)}
        self.last = {
            n: s for n, s in zip(spec.names, spec.shapes, strict=True) if n in kernels and len(s) == 4
        }
        if sum(self._parameters[name].numel() for name in self.last) > _SMALL:
            self.last = {}

    def views(self, flat_D: Tensor) -> dict[str, Tensor]:
        """Each parameter as a view, in its own shape, of a vector ``(D,)`` that lies so."""
        views = self.spec.views(flat_D)
        for name, (out, channels, height, width) in self.last.items():
            views[name] = views[name].view(out, height, width, channels).permute(0, 3, 1, 2)
        return views

    def bind(self, theta_D: Tensor, grad_D: Tensor) -> None:
        """Make the model's parameters views of ``theta_D`` and their gradients views of ``grad_D``."""
        theta, grad = self.views(theta_D), self.views(grad_D)
        for name in self.spec.names:
            self._parameters[name].data = theta[name]
            self._parameters[name].grad = grad[name]

    def inside(self, x_D: Tensor) -> Tensor:
        """``x_D``, which lies as ``spec`` has it, as this does: itself where there is no difference."""
        if not self.last:
            return x_D
        inside_D = x_D.clone()
        views, own = self.spec.views(x_D), self.views(inside_D)
        for name in self.last:
            own[name].copy_(views[name])
        return inside_D

    def outside(self, x_D: Tensor, out_D: Tensor) -> Tensor:
        """``out_D``, set to the values of ``x_D``, which lies as this does, in the order of ``spec``."""
        out_D.copy_(x_D)
        if self.last:
            views, own = self.spec.views(out_D), self.views(x_D)
            for name in self.last:
                views[name].copy_(own[name])
        return out_D
