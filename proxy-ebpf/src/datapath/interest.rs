//! Whether a packet may be anyone's whom the datapath knows: by a few bits, before any table is looked up. A packet that is
//! not of interest is left alone at once; of one that is, the tables say more.

use proxy_common::tables::{FlowKey, Kind, Kinds};
use proxy_common::{Family, proto};

use super::{Client, Tables};
use crate::packet::{Frame, Plain};

/// Of a packet that comes in: it goes to a frontend; or to the node itself, at a port of a Service or of a masqueraded flow; or
/// it begins a flow to an endpoint by its own address and port, or comes from a port that such a flow has been given another one
/// for. What it goes to is no endpoint's otherwise. `None` if it is of no interest.
#[inline(always)]
pub fn comes_in<F: Family, T: Tables<F>>(
    tables: &T,
    plain: Plain,
    key: &FlowKey<F>,
    client: Client,
) -> Option<Kinds> {
    let mut to = tables.interest(&key.dst);
    let asks_server = to.has(Kind::Endpoint)
        && (plain.begins() || tables.is_port(key.sport))
        && tables.is_server(&key.dst, key.dport);
    if !asks_server {
        to = to.without(Kind::Endpoint);
    }
    let is_of_interest = to.has(Kind::Frontend)
        || asks_server
        || to.has(Kind::Node) && tables.is_port(key.dport)
        || is_admitted(tables, plain, client);
    is_of_interest.then_some(to)
}

/// What a packet that goes out is of interest for.
#[derive(Clone, Copy)]
pub struct Ends {
    /// Whom it comes from.
    pub from: Kinds,
    /// Whom it goes to; not asked of one that goes to a pod.
    pub to: Kinds,
    /// Whether it comes from a pod, where pods are masqueraded.
    pub is_pods: bool,
}

/// Of a packet that goes out: it comes from an endpoint. If it leaves the node, also that it comes from a port that is of interest,
/// goes to an endpoint or a frontend, is to be masqueraded, or is the node's own beside such. `None` if it is of no interest, or was
/// translated where it came in and is still a pod's.
#[inline(always)]
pub fn goes_out<F: Family, P: Frame, T: Tables<F>>(
    frame: &P,
    tables: &T,
    key: &FlowKey<F>,
    client: Client,
) -> Option<Ends> {
    let from = tables.interest(&key.src);
    if frame.has_passed() && (client == Client::Pod || !from.has(Kind::Node)) {
        return None;
    }
    let answers = from.has(Kind::Frontend)
        || from.has(Kind::Endpoint) && tables.is_server(&key.src, key.sport);
    if client == Client::Pod {
        return answers.then_some(Ends { from, to: Kinds::NONE, is_pods: false });
    }
    let to = tables.interest(&key.dst);
    let masquerades = tables.setting(|s| &s.masquerade_pods) != 0;
    let is_pods = masquerades && tables.is_pod(&key.src);
    let is_of_interest = answers
        || to.has(Kind::Frontend)
        || to.has(Kind::Endpoint) && tables.is_server(&key.dst, key.dport)
        || masquerades && from.has(Kind::Node)
        || tables.is_port(key.sport)
        || is_pods
        || frame.is_led();
    is_of_interest.then_some(Ends { from, to, is_pods })
}

/// Whether a packet to nobody of ours may be one for a pod by its own address, which is noted where pods are masqueraded.
#[inline(always)]
pub fn is_admitted<F: Family, T: Tables<F>>(tables: &T, plain: Plain, client: Client) -> bool {
    client == Client::Outside
        && !plain.is(proto::TCP)
        && tables.setting(|s| &s.masquerade_pods) != 0
}
