"""Loss balancing: from the tasks' losses or gradients to their weights, one method a file.

The contract is `mtrain.balance.base.Balancer`; users' own are named by their import path.
"""

from mtrain.balance.aligned import AlignedMTL
from mtrain.balance.base import Balancer
from mtrain.balance.cagrad import CAGrad
from mtrain.balance.db_mtl import DBMTL
from mtrain.balance.dwa import DWA
from mtrain.balance.ema import EMA
from mtrain.balance.equal import Equal
from mtrain.balance.fairgrad import FairGrad
from mtrain.balance.famo import FAMO
from mtrain.balance.geometric import Geometric
from mtrain.balance.gradnorm import GradNorm
from mtrain.balance.gradvac import GradVac
from mtrain.balance.imtl_g import IMTLG
from mtrain.balance.imtl_l import IMTLL
from mtrain.balance.mgda import MGDA
from mtrain.balance.nash import Nash
from mtrain.balance.pcgrad import PCGrad
from mtrain.balance.rlw import RLW
from mtrain.balance.static import Static
from mtrain.balance.stch import STCH
from mtrain.balance.uncertainty import Uncertainty
from mtrain.balance.uncertainty_softmax import UncertaintySoftmax
from mtrain.balance.upgrad import UPGrad

BALANCERS: dict[str, type[Balancer]] = {
    "equal": Equal,
    "static": Static,
    "uncertainty": Uncertainty,
    "uncertainty_softmax": UncertaintySoftmax,
    "dwa": DWA,
    "rlw": RLW,
    "geometric": Geometric,
    "imtl_l": IMTLL,
    "famo": FAMO,
    "stch": STCH,
    "ema": EMA,
    "gradnorm": GradNorm,
    "mgda": MGDA,
    "pcgrad": PCGrad,
    "gradvac": GradVac,
    "cagrad": CAGrad,
    "nash": Nash,
    "fairgrad": FairGrad,
    "imtl_g": IMTLG,
    "aligned": AlignedMTL,
    "upgrad": UPGrad,
    "db_mtl": DBMTL,
}
