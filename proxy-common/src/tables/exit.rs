//! By which address pods leave the cluster, link by link.

use crate::map_type;

map_type! {
    /// A node's address on one of its uplinks.
    pub struct Exit<F> {
        /// The address.
        pub address: F::Addr,
    }
}
