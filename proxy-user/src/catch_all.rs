//! The catch-all link: by it comes in again what went to a VIP and was translated where it left the node (docs/decisions/0025).
//!
//! It is a pair of links of which only the first is of use. `ClusterIPs` are routed to it, in the table `local`, which is asked before all
//! others, so that they are caught whatever other routes there are; what goes to other VIPs leaves by an uplink and is caught there. Link
//! and routes stay when the agent ends, as the programs do.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use futures::TryStreamExt;
use proxy_common::abi::CATCH_ALL_MAC;
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_route::route::{RouteMessage, RouteProtocol, RouteScope};
use rtnetlink::{Error, Handle, LinkUnspec, LinkVeth, RouteMessageBuilder, new_connection};
use tokio::sync::watch;

use crate::netlink;

/// Its name.
pub const NAME: &str = "portal0";
/// The name of its other end, by which nothing goes.
pub const PEER: &str = "portal1";
/// By which our routes are known.
pub const PROTOCOL: RouteProtocol = RouteProtocol::Other(112);

/// The table of our routes: `local`. A table of our own would need a rule, and with one rule more than it has by itself the kernel
/// takes longer for each way that it looks up, whosever it is (docs/decisions/0029).
const TABLE: u32 = 255;
/// The metric of our routes: an address of the node's own comes before one.
const METRIC: u32 = 1024;
/// What is on its way is as long as the links take that it comes from and goes to.
const MTU: u32 = 65_535;
/// How often it is looked whether all is still there.
const CHECK: Duration = Duration::from_secs(30);

/// What is set for the link: packets with VIPs as their sources come in by it, that are routed elsewhere (RFC 3704, "loose"). It needs
/// no address of its own.
const SYSCTLS: [(&str, &str); 5] = [
    ("ipv4/conf/portal0/rp_filter", "2"),
    ("ipv4/conf/portal0/forwarding", "1"),
    ("ipv6/conf/portal0/accept_ra", "0"),
    ("ipv6/conf/portal0/addr_gen_mode", "1"),
    ("ipv6/conf/portal1/disable_ipv6", "1"),
];

/// Sees to it that the link is there, or not if it is not wanted, of the agent with these pins. Returns its index; 0 if there is
/// none.
pub async fn prepare(is_wanted: bool, bpffs_root: &Path) -> u32 {
    if !is_wanted {
        if let Err(error) = remove(bpffs_root).await {
            tracing::warn!("{error:#}");
        }
        return 0;
    }
    make(bpffs_root).await.unwrap_or_else(|error| {
        tracing::warn!(
            "{error:#}; pods that start while no agent runs reach no Services until one does. --catch-all=false does \
             without"
        );
        0
    })
}

/// Makes the link, unless it is there. Returns its index.
async fn make(bpffs_root: &Path) -> Result<u32> {
    let (connection, handle, _) = new_connection()?;
    tokio::spawn(connection);
    ensure(&handle, None, &owner(bpffs_root)).await
}

/// Removes the link of the agent with these pins, and its routes with it.
///
/// # Errors
/// If the kernel refuses.
pub async fn remove(bpffs_root: &Path) -> Result<()> {
    let (connection, handle, _) = new_connection()?;
    tokio::spawn(connection);
    if let Some(link) = find(&handle).await
        && is_ours(&link)
        && link.attributes.contains(&LinkAttribute::IfAlias(owner(bpffs_root)))
    {
        handle.link().del(link.header.index).execute().await.context("cannot remove portal0")?;
    }
    Ok(())
}

/// Routes the `ClusterIPs` that it is told of to the link, and sees to it that they and the link stay, for ever.
///
/// # Errors
/// If netlink can't be used.
pub async fn follow(
    index: u32,
    bpffs_root: PathBuf,
    mut wanted: watch::Receiver<BTreeSet<IpAddr>>,
) -> Result<()> {
    let (connection, handle, _) = new_connection()?;
    tokio::spawn(connection);
    let owner = owner(&bpffs_root);
    let mut routes = Routes { handle, index, owner, known: None };
    let mut is_refused = false;
    loop {
        let addresses = wanted.borrow_and_update().clone();
        match routes.sync(&addresses).await {
            Err(error) if !is_refused => {
                tracing::warn!(
                    "pods that start while no agent runs may not reach Services: {error:#}; is tried again"
                );
                is_refused = true;
            }
            Err(error) => tracing::debug!("the catch-all link: {error:#}"),
            Ok(()) => is_refused = false,
        }
        tokio::select! {
            changed = wanted.changed() => changed.context("the agent has ended")?,
            () = tokio::time::sleep(CHECK) => routes.known = None,
        }
    }
}

/// What is routed to the link.
struct Routes {
    handle: Handle,
    index: u32,
    /// What the link says of its agent.
    owner: String,
    /// `None` if it is to be asked.
    known: Option<BTreeSet<IpAddr>>,
}

impl Routes {
    /// Makes the routes those that are wanted. What is refused of one family stops nothing of the other.
    async fn sync(&mut self, wanted: &BTreeSet<IpAddr>) -> Result<()> {
        let mut known = match self.known.take() {
            Some(known) => known,
            None => self.list().await?,
        };
        let mut result = Ok(());
        for v6 in [false, true] {
            let of_family = |addresses: &BTreeSet<IpAddr>| -> BTreeSet<IpAddr> {
                addresses.iter().copied().filter(|address| address.is_ipv6() == v6).collect()
            };
            let (wanted, before) = (of_family(wanted), of_family(&known));
            let synced = self.sync_family(&wanted, &before, &mut known).await;
            result = result.and(synced);
        }
        self.known = Some(known);
        result
    }

    async fn sync_family(
        &self,
        wanted: &BTreeSet<IpAddr>,
        before: &BTreeSet<IpAddr>,
        known: &mut BTreeSet<IpAddr>,
    ) -> Result<()> {
        for address in before.difference(wanted) {
            let gone = self.handle.route().del(route(*address, self.index)).execute().await;
            // It may have gone with the link.
            gone.or_else(|error| if is(&error, libc::ESRCH) { Ok(()) } else { Err(error) })?;
            known.remove(address);
        }
        for address in wanted.difference(before) {
            let added = self.handle.route().add(route(*address, self.index)).replace();
            added.execute().await.with_context(|| format!("no route to {address}"))?;
            known.insert(*address);
        }
        Ok(())
    }

    /// The routes that are there, of an agent before too.
    async fn list(&self) -> Result<BTreeSet<IpAddr>> {
        let index = ensure(&self.handle, Some(self.index), &self.owner).await?;
        anyhow::ensure!(
            index == self.index,
            "another link has the name {NAME}; started anew, the agent takes it"
        );
        let mut known = BTreeSet::new();
        let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
        for all_of_family in [v4, v6] {
            let mut all = self.handle.route().get(all_of_family).execute();
            while let Some(route) = all.try_next().await? {
                if is_of_ours(&route) {
                    known.insert(netlink::destination(&route).addr());
                }
            }
        }
        Ok(known)
    }
}

/// Makes the link, with that index if it had one, unless it is there.
async fn ensure(handle: &Handle, index: Option<u32>, owner: &str) -> Result<u32> {
    let found = find(handle).await;
    if let Some(link) = &found {
        anyhow::ensure!(is_ours(link), "a link that is none of Portal's is called {NAME}");
    } else {
        let pair = LinkVeth::new(NAME, PEER).address(CATCH_ALL_MAC.to_vec()).arp(false).mtu(MTU);
        let pair = pair.index(index.unwrap_or_default()).build();
        handle.link().add(pair).execute().await.context("cannot make the pair of links portal0")?;
    }
    // Also of one that is there: it may have been left half made, or was set down.
    for (name, value) in SYSCTLS {
        // What is not there (IPv6) needs no setting.
        if let Err(error) = fs::write(format!("/proc/sys/net/{name}"), value)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!("cannot set net/{name} to {value}: {error}");
        }
    }
    let has_owner = found.is_some_and(|link| {
        link.attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::IfAlias(_)))
    });
    let mut made = 0;
    for name in [PEER, NAME] {
        let mut found = handle.link().get().match_name(name.to_owned()).execute();
        let link = found.try_next().await?.with_context(|| format!("no link {name}"))?;
        made = link.header.index;
        let up = LinkUnspec::new_with_index(made).mtu(MTU).up();
        let up = if has_owner { up } else { up.alias(owner) };
        let up = handle.link().set(up.build()).execute();
        up.await.with_context(|| format!("link {name}"))?;
    }
    Ok(made)
}

/// By which the link's agent is known, to whoever looks at the link and to `portal cleanup`.
fn owner(bpffs_root: &Path) -> String {
    format!("portal --bpffs-root={}", bpffs_root.display())
}

async fn find(handle: &Handle) -> Option<LinkMessage> {
    let mut found = handle.link().get().match_name(NAME.to_owned()).execute();
    found.try_next().await.ok().flatten()
}

fn is_ours(link: &LinkMessage) -> bool {
    link.attributes.contains(&LinkAttribute::Address(CATCH_ALL_MAC.to_vec()))
}

fn is(error: &Error, number: i32) -> bool {
    matches!(error, Error::NetlinkError(message) if message.raw_code() == -number)
}

/// Whether a route is one of those that we make.
fn is_of_ours(route: &RouteMessage) -> bool {
    (route.header.protocol, u32::from(route.header.table)) == (PROTOCOL, TABLE)
}

fn route(to: IpAddr, index: u32) -> RouteMessage {
    match to {
        IpAddr::V4(to) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(to, 32)
            .output_interface(index)
            .scope(RouteScope::Link)
            .table_id(TABLE)
            .priority(METRIC)
            .protocol(PROTOCOL)
            .build(),
        IpAddr::V6(to) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(to, 128)
            .output_interface(index)
            .table_id(TABLE)
            .priority(METRIC)
            .protocol(PROTOCOL)
            .build(),
    }
}
