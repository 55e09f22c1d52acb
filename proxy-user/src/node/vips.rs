//! Which addresses the catch-all link is told of.

use super::Node;
use crate::plan::Op;

impl Node {
    /// Tells the catch-all link of the `ClusterIPs` that there are now, if writes have changed that.
    pub(super) fn tell_vips(&self, ops: &[Op]) {
        if ops.iter().any(|op| matches!(op, Op::Mark { .. } | Op::Unmark { .. })) {
            // Nobody listens where there is no such link.
            let _ = self.vips.send(self.agent.cluster_ips());
        }
    }
}
