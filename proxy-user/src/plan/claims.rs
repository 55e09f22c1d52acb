//! Who has a frontend. Two Services may claim the same one (KP-44 leaves it to chance): the older has
//! it, by creation time and then by name, and the younger gets it when the older gives it up.

use std::collections::{BTreeSet, HashMap};

use crate::desired::{Frontend, PortId};

/// A claim: creation time, then identity, so that the first in order is the one that counts.
type Claim = (String, PortId);

/// All claims to frontends.
#[derive(Default)]
pub struct Claims {
    by_frontend: HashMap<Frontend, BTreeSet<Claim>>,
}

impl Claims {
    /// Adds a claim. `None` if nobody else claims the frontend; otherwise who has it now.
    pub fn claim(&mut self, frontend: Frontend, port: &PortId, created: &str) -> Option<PortId> {
        let claims = self.by_frontend.entry(frontend).or_default();
        // A Service that was created anew has another time.
        claims.retain(|(_, claimant)| claimant != port);
        claims.insert((created.to_owned(), port.clone()));
        if claims.len() == 1 {
            return None;
        }
        claims.first().map(|(_, holder)| holder.clone())
    }

    /// Takes a claim back. Returns who has the frontend now.
    pub fn release(&mut self, frontend: Frontend, port: &PortId) -> Option<PortId> {
        let claims = self.by_frontend.get_mut(&frontend)?;
        claims.retain(|(_, claimant)| claimant != port);
        let holder = claims.first().map(|(_, holder)| holder.clone());
        if claims.is_empty() {
            self.by_frontend.remove(&frontend);
        }
        holder
    }
}
