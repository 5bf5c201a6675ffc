"""Station 5: networks (state, time) -> velocity.

A field's configuration is a frozen dataclass with a `kind`; `build` makes the network. A new
kind of field is entered in `FieldConfig`, the union that config.json files and recipes are read by.
"""

from .carriers import CarriersField, CarriersFieldConfig
from .conv import ConvField, LdmFieldConfig, TinyFieldConfig
from .local import LocalField, LocalFieldConfig
from .projector import Projector
from .sit import SiTField, SiTFieldConfig, sit
from .unet import UNet, UNetConfig, UNetField, UNetFieldConfig

FieldConfig = (
    TinyFieldConfig | LdmFieldConfig | LocalFieldConfig | CarriersFieldConfig | UNetFieldConfig | SiTFieldConfig
)

__all__ = [
    "CarriersField",
    "CarriersFieldConfig",
    "ConvField",
    "FieldConfig",
    "LdmFieldConfig",
    "LocalField",
    "LocalFieldConfig",
    "Projector",
    "SiTField",
    "SiTFieldConfig",
    "TinyFieldConfig",
    "UNet",
    "UNetConfig",
    "UNetField",
    "UNetFieldConfig",
    "sit",
]
