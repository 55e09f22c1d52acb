//! What takes the place of programs on a link before Linux 6.6.

use std::io;

use rtnetlink::packet_core::NLM_F_DUMP;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcMessage};
use rtnetlink::sys::protocols::NETLINK_ROUTE;

use super::ask::Asker;

/// Whether a link has an `ingress` qdisc, which has no place for programs where packets leave; the kernel puts them where packets come
/// in without a word.
///
/// # Errors
/// If netlink can't be used.
pub fn has_ingress_only(ifindex: u32) -> io::Result<bool> {
    let mut question = TcMessage::default();
    question.header.index = ifindex.cast_signed();
    let question = RouteNetlinkMessage::GetQueueDiscipline(question);
    let all = Asker::open(NETLINK_ROUTE)?.ask(question, NLM_F_DUMP, None)?;
    // The kernel tells of all links.
    Ok(all.iter().any(|message| match message {
        RouteNetlinkMessage::NewQueueDiscipline(qdisc) => {
            qdisc.header.index == ifindex.cast_signed() && is_ingress(qdisc)
        }
        _ => false,
    }))
}

fn is_ingress(qdisc: &TcMessage) -> bool {
    let is_kind =
        |attribute: &TcAttribute| matches!(attribute, TcAttribute::Kind(kind) if kind == "ingress");
    qdisc.header.parent == TcHandle::INGRESS && qdisc.attributes.iter().any(is_kind)
}
